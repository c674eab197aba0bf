package recovery

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Record is what the server knows of a VM, as agents keep it for the day on
// which the server is lost.
type Record struct {
	Protection switchback.Protection `json:"protection"`
	// Operation is the one that was under way, if any, with its parameters.
	Operation Kind            `json:"operation,omitempty"`
	Params    json.RawMessage `json:"params,omitempty"`
}

// Newer reports whether r was written after o: epochs and versions only grow.
func (r Record) Newer(o Record) bool {
	return cmp.Or(cmp.Compare(r.Protection.Epoch, o.Protection.Epoch), cmp.Compare(r.Protection.Version, o.Protection.Version)) > 0
}

// Keeper is an agent that has a part in a VM.
type Keeper struct {
	Agent   switchback.AgentID `json:"agent"`
	Site    switchback.SiteID  `json:"site"`
	Address string             `json:"address"`
}

// Roles of agents, as in package agentapi, which this one cannot import.
const (
	roleSource = "source"
	roleTarget = "target"
	roleActive = "active"
	roleFenced = "fenced"
)

// Holding is what one agent holds of one protected VM: facts, and its copy of
// the server's record.
type Holding struct {
	Keeper     Keeper                  `json:"keeper"`
	Protection switchback.ProtectionID `json:"protection"`
	VM         switchback.VMUUID       `json:"vm_uuid"`
	Name       string                  `json:"name"`
	Epoch      switchback.Epoch        `json:"epoch"`
	Role       string                  `json:"role"`
	Peer       Keeper                  `json:"peer"`
	Policy     switchback.Policy       `json:"policy"`
	// Held: a source takes no points. ShutdownAsked: for a switch.
	Held          bool `json:"held,omitempty"`
	ShutdownAsked bool `json:"shutdown_asked,omitempty"`
	// Power is the domain's state here; "absent" where it is not defined.
	Power string            `json:"power"`
	Disks []switchback.Disk `json:"disks"`
	// OwnDisks: they are the VM's own, not images in the agent's storage: this is its home.
	OwnDisks bool `json:"own_disks,omitempty"`
	// Replica says that points are kept here; Points how many, of what size. Newest is
	// also set by a source that knows of one at its target.
	Replica      bool              `json:"replica,omitempty"`
	Points       int               `json:"points,omitempty"`
	Newest       *switchback.Point `json:"newest,omitempty"`
	JournalBytes int64             `json:"journal_bytes,omitempty"`
	// Frozen: every point is kept, since a switch is about to choose one, or has.
	Frozen bool `json:"frozen,omitempty"`
	// Unreadable says why the replica cannot be opened; "" = it can.
	Unreadable string `json:"unreadable,omitempty"`
	// Run is what an uncommitted VM runs on; Change is set while it is being replaced.
	Run    *HeldRun    `json:"run,omitempty"`
	Change *HeldChange `json:"change,omitempty"`
	// Seeds: the disks are kept for a reprotect. KeptPoints: a commit has kept points.
	Seeds      bool    `json:"seeds,omitempty"`
	KeptPoints bool    `json:"kept_points,omitempty"`
	Record     *Record `json:"record,omitempty"`
}

// HeldChange is a change of the point under way: where to.
type HeldChange struct {
	Sequence switchback.Sequence `json:"sequence"`
	Snapshot string              `json:"snapshot,omitempty"`
}

// HeldRun is an uncommitted VM's run.
type HeldRun struct {
	Epoch switchback.Epoch `json:"epoch"`
	// Point it was started from; only its sequence is known where the replica cannot be opened.
	Point    switchback.Point `json:"point"`
	Snapshot string           `json:"snapshot,omitempty"`
	// Follows: it came after another run of the same switch.
	Follows   bool      `json:"follows,omitempty"`
	Started   bool      `json:"started,omitempty"`
	StartedAt time.Time `json:"started_at,omitzero"`
	// Committing: a commit has begun to change what it runs on.
	Committing bool `json:"committing,omitempty"`
}

// Adopted is what a server makes of what agents hold of one VM.
type Adopted struct {
	Protection switchback.Protection `json:"protection"`
	// Next is the operation that leads on from where the lost server was; "" = none is needed.
	Next   Kind            `json:"next,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	// Why says so in words; Notes are what else is to be known.
	Why   string   `json:"why,omitempty"`
	Notes []string `json:"notes,omitempty"`
	// Missing is the agent that has a part in it and did not answer.
	Missing *Keeper `json:"missing,omitempty"`
	Points  int     `json:"points"`
}

// mintMargin is how far above everything known the next epoch is minted where an
// agent did not answer: it may know of epochs that nobody else does.
const mintMargin = 16

// Rebuild finds out how a VM stands from what agents hold of it, without a
// server that knows. Facts at agents come before the record, which may be a few
// seconds older. answered says whether an agent was asked. The result's epoch is
// never lower than any that an agent knows, its version than any record's.
// CodeConflict: the agents contradict each other; CodeNotFound: there is not enough.
func Rebuild(list []Holding, answered func(switchback.AgentID) bool, now time.Time) (Adopted, error) {
	b := builder{now: now}
	if err := b.sort(list); err != nil {
		return b.out, err
	}
	b.begin(list)
	switch {
	case b.src != nil:
		b.replicated()
	case b.act != nil:
		b.active()
	case b.fen != nil && b.tgt != nil:
		b.between(b.fen, b.tgt, "neither side owns it: a switch was under way")
	default:
		if err := b.oneSide(answered); err != nil {
			return b.out, err
		}
	}
	b.finish(answered)
	return b.out, nil
}

type builder struct {
	now                time.Time
	src, tgt, act, fen *Holding
	rec                *Record
	out                Adopted
	p                  *switchback.Protection
}

// sort finds who does what; of two with the same role the newer epoch counts, and
// of two that would both own the VM.
func (b *builder) sort(list []Holding) error {
	for i := range list {
		h := &list[i]
		slot := map[string]**Holding{roleSource: &b.src, roleTarget: &b.tgt, roleActive: &b.act, roleFenced: &b.fen}[h.Role]
		if slot == nil {
			return switchback.Errorf(switchback.CodeConflict, "agent %s has role %q for VM %s", h.Keeper.Agent, h.Role, h.Name)
		}
		if *slot == nil || h.Epoch > (*slot).Epoch {
			*slot = h
		}
		if h.Record != nil && (b.rec == nil || h.Record.Newer(*b.rec)) {
			b.rec = h.Record
		}
	}
	if b.src != nil && b.act != nil && b.src.Epoch != b.act.Epoch {
		// The older one has not heard yet that it is fenced.
		old, which := b.src, &b.src
		if b.act.Epoch < b.src.Epoch {
			old, which = b.act, &b.act
		}
		b.note("site %s (epoch %d) counts as fenced: the VM is active elsewhere under a newer epoch", old.Keeper.Site, old.Epoch)
		if b.fen == nil || old.Epoch > b.fen.Epoch {
			b.fen = old
		}
		*which = nil
	}
	if b.src != nil && b.act != nil {
		return switchback.Errorf(switchback.CodeConflict, "VM %s is active at %s (epoch %d) and at %s (epoch %d)",
			b.src.Name, b.src.Keeper.Site, b.src.Epoch, b.act.Keeper.Site, b.act.Epoch).
			WithHint("turn it off at one of them, stop that agent and remove the VM's file from its assignments directory; then adopt again")
	}
	return nil
}

// begin makes the protection from the record, or what can be known without one.
func (b *builder) begin(list []Holding) {
	if b.rec != nil {
		b.out.Protection = b.rec.Protection
	} else {
		h := list[0]
		b.out.Protection = switchback.Protection{ID: h.Protection, VM: h.VM, Name: h.Name, CreatedAt: b.now, Phase: switchback.PhaseProtected}
		b.note("no agent has the server's record of it: its network mapping is not known; name it with 'switchback apply' or protect it anew")
	}
	b.p = &b.out.Protection
	b.p.MintAbove = 0
	for _, h := range list {
		b.p.Epoch = max(b.p.Epoch, h.Epoch)
		if h.Record != nil {
			b.p.Epoch = max(b.p.Epoch, h.Record.Protection.Epoch)
			b.p.Version = max(b.p.Version, h.Record.Protection.Version)
		}
		b.out.Points = max(b.out.Points, h.Points)
		if h.Unreadable != "" {
			b.note("its replica at %s cannot be opened: %s", h.Keeper.Site, h.Unreadable)
		}
	}
	b.p.Operation, b.p.Ended, b.p.Drill.Operation, b.p.Drill.Release = "", "", "", ""
}

func (b *builder) note(format string, args ...any) {
	b.out.Notes = append(b.out.Notes, fmt.Sprintf(format, args...))
}

// was is the phase in the record; "" without one.
func (b *builder) was() switchback.Phase {
	if b.rec == nil {
		return ""
	}
	return b.rec.Protection.Phase
}

func (b *builder) sides(source, target Keeper) {
	b.p.Source, b.p.SourceAgent, b.p.Target, b.p.TargetAgent = source.Site, source.Agent, target.Site, target.Agent
}

// next asks for an operation that leads on.
func (b *builder) next(k Kind, params json.RawMessage, why string) {
	b.out.Next, b.out.Params, b.out.Why = k, params, why
}

// replicated: one side is the source.
func (b *builder) replicated() {
	src := b.src
	b.p.Policy, b.p.Disks = src.Policy, src.Disks
	target := src.Peer
	if b.tgt != nil {
		target = b.tgt.Keeper
	}
	interrupted := ""
	switch {
	case b.fen != nil && b.tgt == nil && b.fen.Epoch > src.Epoch:
		interrupted = "an undo was under way"
	case b.tgt != nil && b.tgt.Epoch > src.Epoch:
		interrupted = "an undo was under way"
	case b.was() == switchback.PhaseUndoing && b.tgt != nil && !src.Held && src.Epoch == b.p.Epoch:
		// The undo has ended at both agents; the record is a moment older.
	case b.was() == switchback.PhaseSwitching || b.was() == switchback.PhaseUndoing:
		interrupted = "a switch was under way"
	case b.tgt != nil && b.tgt.Frozen:
		interrupted = "a switch was beginning"
	case src.Held && src.ShutdownAsked:
		interrupted = "a switch was under way: the guest was asked to power off"
	}
	if interrupted != "" {
		to := Holding{Keeper: target}
		if b.tgt != nil {
			to = *b.tgt
		}
		b.between(src, &to, interrupted)
		return
	}
	b.sides(src.Keeper, target)
	b.p.Switch = nil
	b.p.Paused = src.Held && b.was() != switchback.PhaseCommitted
	points := b.tgt != nil && b.tgt.Points > 0 || b.tgt == nil && src.Newest != nil
	switch was := b.was(); {
	case points || b.tgt == nil && was == switchback.PhaseProtected:
		b.p.Phase = switchback.PhaseProtected
		delete(b.p.Seeds, b.p.Target)
	case was == switchback.PhaseReprotecting || was == switchback.PhaseCommitted || b.tgt != nil && b.tgt.OwnDisks:
		b.p.Phase = switchback.PhaseReprotecting
		b.next(Reprotect, nil, "the first point in the new direction was not there yet")
	default:
		b.p.Phase = switchback.PhaseSeeding
		b.next(Protect, nil, "the first full copy was under way")
	}
}

// between: a switch was interrupted before its guest ran at the new side. It is
// taken back: that is what the lost server would have done with a failed one.
func (b *builder) between(from, to *Holding, why string) {
	sw := b.p.Switch
	if sw == nil || sw.From != from.Keeper.Site {
		sw = &switchback.Switch{PreviousEpoch: from.Epoch, WasRunning: from.ShutdownAsked || from.Power == "running" || from.Power == "paused", StartedAt: b.now}
	}
	c := *sw
	c.From, c.FromAgent, c.To, c.ToAgent, c.Changing = from.Keeper.Site, from.Keeper.Agent, to.Keeper.Site, to.Keeper.Agent, nil
	c.UndoEpoch = 0              // a new one is minted: it may have been told to one side already
	if from.Role == roleSource { // not left yet, or reinstated: the new side is not active
		c.Epoch = 0
	}
	b.p.Switch = &c
	b.sides(from.Keeper, to.Keeper)
	b.p.Policy, b.p.Disks = from.Policy, from.Disks
	b.p.Phase = switchback.PhaseSwitching
	b.next(Cancel, nil, why+"; it is taken back, the VM stays at "+string(from.Keeper.Site))
}

// active: one side runs the VM, or is to.
func (b *builder) active() {
	act := b.act
	other := Holding{Keeper: act.Peer}
	for _, h := range []*Holding{b.tgt, b.fen} {
		if h != nil {
			other = *h
		}
	}
	run := act.Run
	switch {
	case run == nil && act.Replica || run != nil && !run.Started && act.Change == nil && !run.Follows:
		b.between(&other, act, "a switch was under way, its guest had not started at "+string(act.Keeper.Site))
		return
	case b.was() == switchback.PhaseUndoing && run != nil && b.p.Switch != nil:
		b.between(&other, act, "an undo was under way")
		return
	}
	b.sides(act.Keeper, other.Keeper)
	b.p.Policy, b.p.Disks = act.Policy, act.Disks
	b.p.KeptPoints = act.KeptPoints
	if run == nil {
		b.committed(other)
		return
	}
	b.switched(other)
	switch {
	case run.Committing || b.was() == switchback.PhaseCommitting:
		b.p.Phase = switchback.PhaseCommitting
		b.next(Commit, b.commitParams(), "a commit was under way")
	case act.Change != nil || !run.Started:
		b.p.Phase = switchback.PhaseSwitching
		to := HeldChange{Sequence: run.Point.Sequence, Snapshot: run.Snapshot}
		if act.Change != nil {
			to = *act.Change
		}
		b.next(ChangePoint, changeTo(to), "a change of the point was under way")
	default:
		b.p.Phase = switchback.PhaseSwitched
		if b.was() == switchback.PhaseSwitching {
			b.note("that the guest's checks passed after its start was not seen")
		}
	}
}

// changeTo are parameters of change-point.
func changeTo(c HeldChange) json.RawMessage {
	params := map[string]string{"snapshot": c.Snapshot}
	if c.Snapshot == "" {
		params["point"] = fmt.Sprint(uint64(c.Sequence))
	}
	raw, _ := json.Marshal(params) // strings: never fails
	return raw
}

// switched fills in what the uncommitted switch rests on.
func (b *builder) switched(other Holding) {
	act, run := b.act, b.act.Run
	sw := switchback.Switch{WasRunning: true, StartedAt: run.StartedAt, PreviousEpoch: act.Epoch - 1}
	if s := b.p.Switch; s != nil && s.To == act.Keeper.Site {
		sw = *s
	}
	sw.From, sw.FromAgent, sw.To, sw.ToAgent = other.Keeper.Site, other.Keeper.Agent, act.Keeper.Site, act.Keeper.Agent
	sw.Epoch = b.p.Epoch // the new side's, and the newest that anybody knows
	if sw.Point.Sequence != run.Point.Sequence || sw.Point.Digest == "" {
		sw.Point = run.Point
	}
	if sw.Last.Sequence == 0 && act.Newest != nil {
		sw.Last = *act.Newest
	}
	if sw.Changing != nil && run.Started && run.Epoch == b.p.Epoch { // it runs from there
		sw.Point, sw.Snapshot, sw.Changing = run.Point, run.Snapshot, nil
	}
	sw.Overdue = ""
	sw.Deadline = b.p.Policy.Commit.Deadline(b.now)
	if !sw.Deadline.IsZero() {
		b.note("the countdown to %s begins anew", b.p.Policy.Commit.Action)
	}
	b.p.Switch = &sw
}

// committed: it runs on plain disks.
func (b *builder) committed(other Holding) {
	b.p.Switch = nil
	b.p.Phase = switchback.PhaseCommitted
	if other.Seeds {
		if b.p.Seeds == nil {
			b.p.Seeds = map[switchback.SiteID][]switchback.Disk{}
		}
		b.p.Seeds[other.Keeper.Site] = other.Disks
	}
	switch {
	case b.was() == switchback.PhaseCommitting:
		b.p.Phase = switchback.PhaseCommitting
		b.next(Commit, b.commitParams(), "a commit was under way: the old side is settled")
	case b.rec != nil && b.rec.Operation == Reprotect:
		b.next(Reprotect, nil, "a reprotect was under way")
	}
}

// commitParams are those of the commit that was under way: alone or as part of a failback.
func (b *builder) commitParams() json.RawMessage {
	if b.rec != nil && (b.rec.Operation == Commit || b.rec.Operation == Failback) && len(b.rec.Params) > 0 {
		return b.rec.Params
	}
	choice := map[string]string{"snapshots": "keep", "points": "delete"}
	if b.act.KeptPoints {
		choice["points"] = "keep"
	}
	raw, _ := json.Marshal(choice) // strings: never fails
	return raw
}

// oneSide: only the side that does not own the VM is known.
func (b *builder) oneSide(answered func(switchback.AgentID) bool) error {
	h := b.tgt
	if h == nil {
		h = b.fen
	}
	if answered(h.Peer.Agent) || b.rec != nil && h.Role == roleTarget && answered(b.rec.Protection.SourceAgent) {
		if h.Role == roleTarget && b.rec != nil && b.was() == switchback.PhaseUnprotected {
			b.p.Phase = switchback.PhaseSeeding
			b.next(Protect, nil, "it was just being protected")
			return nil
		}
		return switchback.Errorf(switchback.CodeNotFound, "agent %s has role %s for VM %s, and its peer %s knows nothing of it", h.Keeper.Agent, h.Role, h.Name, h.Peer.Agent).
			WithHint("its points can be read with 'switchback replica inspect' and 'export' at site %s", h.Keeper.Site)
	}
	if b.rec == nil && h.Role == roleFenced {
		return switchback.Errorf(switchback.CodeNotFound, "of VM %s only the fenced side is known", h.Name).
			WithHint("adopt the agent of %s at %s as well", h.Peer.Site, h.Peer.Address)
	}
	if h.Role == roleTarget {
		b.sides(h.Peer, h.Keeper)
		b.p.Policy = h.Policy
		if len(b.p.Disks) == 0 {
			b.p.Disks = h.Disks
		}
		if h.Points > 0 && b.p.Phase == switchback.PhaseSeeding {
			b.p.Phase = switchback.PhaseProtected
		}
		if b.p.Phase == switchback.PhaseProtected {
			b.p.Switch = nil
		}
	}
	return nil
}

// finish notes whom nobody heard, and what home is.
func (b *builder) finish(answered func(switchback.AgentID) bool) {
	if b.p.Home == "" {
		b.p.Home = b.p.Source
		for _, h := range []*Holding{b.src, b.act, b.fen, b.tgt} {
			if h != nil && h.OwnDisks {
				b.p.Home = h.Keeper.Site
				break
			}
		}
	}
	known := map[switchback.AgentID]Keeper{}
	for _, h := range []*Holding{b.src, b.act, b.fen, b.tgt} {
		if h != nil {
			known[h.Peer.Agent] = h.Peer
		}
	}
	for _, id := range []switchback.AgentID{b.p.SourceAgent, b.p.TargetAgent} {
		if id == "" || answered(id) {
			continue
		}
		k := known[id]
		if k.Agent == "" {
			k = Keeper{Agent: id, Site: b.p.Source}
			if id == b.p.TargetAgent {
				k.Site = b.p.Target
			}
		}
		b.out.Missing = &k
		b.p.MintAbove = b.p.Epoch + mintMargin
		b.note("agent %s of site %s (%s) did not answer: what it knows is not in this; adopt it when it is back", k.Agent, k.Site, k.Address)
	}
	if b.out.Missing != nil && b.out.Next != "" {
		// It would fail for want of the agent, and then undo what it should not.
		b.note("%s: it is led on with %s once that agent is adopted, too", b.out.Why, b.out.Next)
		b.out.Next, b.out.Params, b.out.Why = "", nil, ""
	}
	b.p.Version++
	slices.Sort(b.out.Notes)
	b.out.Notes = slices.Compact(b.out.Notes)
}
