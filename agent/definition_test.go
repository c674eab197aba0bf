package agent

import (
	"testing"
	"time"

	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

// TestDescribed: a definition is told again when anything that counts is another,
// and now and then all the same.
func TestDescribed(t *testing.T) {
	as := Assignment{Epoch: 3, Peer: agentapi.Peer{Agent: "a-1"}}
	now := journal.Definition{Text: "<domain/>", Networks: []string{"lan"}, Time: time.Now()}
	told := described{epoch: 3, peer: "a-1", Definition: now, at: now.Time}
	if !told.covers(as, now) {
		t.Error("the same counts as another")
	}
	for name, change := range map[string]func(d *described, as *Assignment, now *journal.Definition){
		"nothing told":      func(d *described, _ *Assignment, _ *journal.Definition) { *d = described{} },
		"another epoch":     func(_ *described, as *Assignment, _ *journal.Definition) { as.Epoch = 5 },
		"another target":    func(_ *described, as *Assignment, _ *journal.Definition) { as.Peer.Agent = "a-2" },
		"defined otherwise": func(_ *described, _ *Assignment, now *journal.Definition) { now.Text = "<domain id='1'/>" },
		"another network":   func(_ *described, _ *Assignment, now *journal.Definition) { now.Networks = []string{"dmz"} },
		"long ago":          func(d *described, _ *Assignment, _ *journal.Definition) { d.at = d.at.Add(-2 * describeAgain) },
	} {
		d, a, n := told, as, now
		change(&d, &a, &n)
		if d.covers(a, n) {
			t.Errorf("%s: not told again", name)
		}
	}
}
