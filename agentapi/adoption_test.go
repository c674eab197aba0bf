package agentapi

import (
	"fmt"
	"testing"

	switchback "github.com/switchback-dr/switchback"
)

func TestStaleRecords(t *testing.T) {
	of := func(id switchback.ProtectionID, version int64) VMStatus {
		return VMStatus{Protection: id, RecordVersion: version}
	}
	for name, c := range map[string]struct {
		list  []VMStatus
		stale int
		ahead bool
	}{
		"none":          {},
		"as new":        {list: []VMStatus{of("a", 5)}},
		"older":         {list: []VMStatus{of("a", 4), of("b", 0)}, stale: 2},
		"newer":         {list: []VMStatus{of("a", 6)}, ahead: true},
		"not known":     {list: []VMStatus{of("c", 6)}},
		"more than fit": {list: many(40), stale: reportRecords},
	} {
		t.Run(name, func(t *testing.T) {
			versions := map[switchback.ProtectionID]int64{"a": 5, "b": 1}
			for i := range 40 {
				versions[switchback.ProtectionID(fmt.Sprint(i))] = 2
			}
			stale, ahead := StaleRecords(c.list, versions)
			if len(stale) != c.stale || ahead != c.ahead {
				t.Errorf("%v, %v", stale, ahead)
			}
		})
	}
}

func many(n int) (list []VMStatus) {
	for i := range n {
		list = append(list, VMStatus{Protection: switchback.ProtectionID(fmt.Sprint(i)), RecordVersion: 1})
	}
	return list
}
