package server

import (
	"encoding/json"

	"github.com/switchback-dr/switchback/operation"
)

// OperationSteps are the steps of one kind of operation.
type OperationSteps struct {
	Kind  string
	Steps []StepInfo
}

// StepInfo is what tests have to know of a step.
type StepInfo struct {
	Name string
	// Undo: it has an effect that is taken back when the operation is undone.
	Undo bool
	// Cancellable and Irreversible as in operation.Step.
	Cancellable, Irreversible bool
}

// Registry lists every kind of operation that the server knows, with all steps
// that it can have.
func Registry() ([]OperationSteps, error) {
	all, err := json.Marshal(switchParams{FromCommitted: true, AndCommit: true, AndReprotect: true})
	if err != nil {
		return nil, err
	}
	var list []OperationSteps
	for _, d := range (&Server{}).definitions() {
		steps, err := d.Steps(all)
		if err != nil {
			return nil, err
		}
		o := OperationSteps{Kind: d.Kind}
		for _, s := range steps {
			o.Steps = append(o.Steps, info(s))
		}
		list = append(list, o)
	}
	return list, nil
}

func info(s operation.Step) StepInfo {
	return StepInfo{Name: s.Name, Undo: s.Undo != nil, Cancellable: s.Cancellable, Irreversible: s.Irreversible}
}
