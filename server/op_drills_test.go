package server

import (
	"testing"

	"github.com/switchback-dr/switchback/operation"
)

// TestPastStep: others wait for a drill only as long as it may still get there.
func TestPastStep(t *testing.T) {
	at := func(s operation.State, start, checks operation.StepState) operation.Record {
		return operation.Record{State: s, Steps: []operation.StepRecord{{Name: "start", State: start}, {Name: "checks", State: checks}}}
	}
	cancelled := at(operation.StateRunning, operation.StepRunning, operation.StepPending)
	cancelled.CancelRequested = true
	for _, c := range []struct {
		name          string
		rec           operation.Record
		start, checks bool
	}{
		{"queued", at(operation.StateQueued, operation.StepPending, operation.StepPending), false, false},
		{"starting", at(operation.StateRunning, operation.StepRunning, operation.StepPending), false, false},
		{"tried again", at(operation.StateRunning, operation.StepWaiting, operation.StepPending), false, false},
		{"started", at(operation.StateRunning, operation.StepDone, operation.StepRunning), true, false},
		{"checked", at(operation.StateRunning, operation.StepDone, operation.StepDone), true, true},
		{"to be cancelled", cancelled, true, true},
		{"being undone", at(operation.StateUndoing, operation.StepFailed, operation.StepPending), true, true},
		{"cancelled", at(operation.StateCancelled, operation.StepFailed, operation.StepPending), true, true},
		{"failed", at(operation.StateFailed, operation.StepFailed, operation.StepPending), true, true},
	} {
		if got := pastStep(c.rec, "start"); got != c.start {
			t.Errorf("%s: past its start is %v", c.name, got)
		}
		if got := pastStep(c.rec, "checks"); got != c.checks {
			t.Errorf("%s: past its checks is %v", c.name, got)
		}
	}
}
