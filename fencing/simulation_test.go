package fencing

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// The simulation: one VM, two sites, a server, and a network between the three
// that is cut, delays, loses, repeats and reorders. Processes die and come back,
// hosts reboot, clocks run at different rates, operators start copies by hand.
// Everything that decides is this package's own code (rules); what acts is
// simulated. The checker keeps its own books and trusts none of it.

// rules is what decides; mutants replace some of it.
type rules struct {
	admit        func(Standing, switchback.Epoch) error
	acceptsPoint func(Standing, switchback.Epoch) error
	sendsPoints  func(Standing) bool
	hear         func(Standing, Ruling) (Standing, Hearing)
	answer       func(Standing, switchback.SiteID, switchback.Epoch) Ruling
	become       func(Standing, Role, switchback.Epoch) Standing
	decide       func(Standing, Moment) Decision
	confirm      func(s Standing, boot string, asked, now Instant, by string) Grant
	rule         func(switchback.Protection) Ruling
	// keepRun: what stands under /run outlives a reboot.
	keepRun bool
}

func product() rules {
	return rules{admit: Standing.Admit, acceptsPoint: Standing.AcceptsPoint, sendsPoints: Standing.SendsPoints, hear: Standing.Hear,
		answer: Standing.Answer, become: Standing.Become, decide: Decide, rule: Rule,
		confirm: func(s Standing, boot string, asked, _ Instant, by string) Grant { return Confirm(s, boot, asked, by) }}
}

const (
	siteA, siteB = switchback.SiteID("a"), switchback.SiteID("b")
	theServer    = switchback.SiteID("server")
	tick         = time.Second
	chaosFor     = 5 * time.Minute
	calmFor      = 6 * time.Minute
)

func peerOf(s switchback.SiteID) switchback.SiteID {
	if s == siteA {
		return siteB
	}
	return siteA
}

// event is something that happens at a time.
type event struct {
	at  time.Duration
	seq int
	do  func()
}

type queue []event

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *queue) Pop() any {
	old := *q
	x := old[len(old)-1]
	*q = old[:len(old)-1]
	return x
}

type link struct{ from, to switchback.SiteID }

// world is one run.
type world struct {
	rules
	rnd    *rand.Rand
	now    time.Duration
	seq    int
	events queue
	calm   bool // no more faults
	cut    map[link]bool
	lossy  float64
	tardy  float64 // how often a message takes long, up to slow
	slow   time.Duration

	policy switchback.FencingPolicy
	server *simServer
	hosts  map[switchback.SiteID]*simHost
	books  *books
	trace  []string
	starts int // of the VM, anywhere
	points int // accepted
	moves  int // operations that ended
}

func (w *world) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf("%9.3f ", w.now.Seconds())+fmt.Sprintf(format, args...))
}

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.events, event{w.now + max(0, d), w.seq, do})
}

func (w *world) between(least, most time.Duration) time.Duration {
	return least + time.Duration(w.rnd.Int64N(int64(most-least)+1))
}

func (w *world) chance(p float64) bool { return w.rnd.Float64() < p }

// send delivers to a process that may have died or been cut off meanwhile:
// never, once, or several times, late, and not in order.
func (w *world) send(from, to switchback.SiteID, deliver func()) {
	copies := 1
	if !w.calm && w.chance(w.lossy) {
		copies = w.rnd.IntN(3) // none, one or two
	}
	for range copies {
		delay := w.between(time.Millisecond, 50*time.Millisecond)
		if !w.calm && w.chance(w.tardy) {
			delay = w.between(0, w.slow)
		}
		if w.cut[link{from, to}] {
			return
		}
		w.after(delay, func() {
			if !w.cut[link{from, to}] {
				deliver()
			}
		})
	}
}

// simHost is a site: its agent, its hypervisor and what they keep.
type simHost struct {
	w    *world
	site switchback.SiteID
	rate float64 // of its clock
	// durable
	standing  Standing
	autostart bool
	boots     int
	bootedAt  time.Duration
	// gone with a reboot
	grant    Grant
	up       Instant
	hasUp    bool
	autoDone bool
	byLease  bool // turned off because its lease had ended
	running  bool
	paused   bool
	// stuck: the hypervisor turns the VM off only after that; 0 = at once.
	stuck     time.Duration
	vmEpoch   switchback.Epoch // under which it was started
	heardFrom time.Duration
	// of the processes
	hostUp, agentUp bool
	life            int             // raised by each start of the agent
	done            map[string]bool // tasks of this life, by key
}

func (h *simHost) clock() Instant {
	return Instant(float64(h.w.now-h.bootedAt) * h.rate)
}

func (h *simHost) boot() string {
	if h.w.keepRun {
		return string(h.site)
	}
	return fmt.Sprintf("%s-%d", h.site, h.boots)
}

func (h *simHost) moment() Moment {
	return Moment{Now: h.clock(), Boot: h.boot(), Up: h.up, Grant: h.grant, Running: h.running}
}

func (h *simHost) alive() bool { return h.hostUp && h.agentUp }

// runs: the guest is executing.
func (h *simHost) runs() bool { return h.hostUp && h.running && !h.paused }

func (h *simHost) start(why string) {
	if h.running && !h.paused {
		return
	}
	fresh := !h.running
	h.running, h.paused, h.vmEpoch = true, false, h.standing.Epoch
	h.w.note("%s: VM runs under epoch %d (%s)", h.site, h.vmEpoch, why)
	h.w.starts++
	h.w.books.started(h, fresh)
}

// tryStop is a stop by the agent, which may fail for a moment.
func (h *simHost) tryStop(why string) bool {
	if h.running && h.stuck == 0 && !h.w.calm && h.w.chance(0.2) {
		h.stuck = h.w.now + h.w.between(0, 2*tick)
	}
	if h.running && h.w.now < h.stuck {
		h.w.note("%s: VM is not turned off (%s)", h.site, why)
		return false
	}
	h.stop(why)
	return true
}

// stopping: a stop has failed, and its next try is not due yet, or nobody is there to try.
func (h *simHost) stopping() bool {
	return h.stuck != 0 && (!h.alive() || h.w.now < h.stuck+2*tick)
}

func (h *simHost) stop(why string) {
	h.stuck = 0
	if h.running {
		h.w.note("%s: VM off (%s)", h.site, why)
	}
	h.running, h.paused = false, false
}

// hook is what the hypervisor asks before any start; it sees files only.
func (h *simHost) hook() bool {
	if !h.standing.Role.Owns() && !h.standing.Contested {
		return false // a fence file
	}
	return h.w.decide(h.standing, h.moment()).MayStart
}

// look is the agent's round: decide, act, ask.
func (h *simHost) look() {
	if !h.hasUp {
		h.up, h.hasUp = h.clock(), true
	}
	h.act()
	if h.standing.Role.Owns() {
		asked, epoch, life := h.clock(), h.standing.Epoch, h.life
		back := func(from switchback.SiteID, r Ruling) func() {
			return func() {
				if h.alive() && h.life == life {
					h.hear(r, asked, from)
				}
			}
		}
		h.w.send(h.site, theServer, func() {
			if h.w.server.up {
				h.w.send(theServer, h.site, back(theServer, h.w.rule(h.w.server.p)))
			}
		})
		peer := h.w.hosts[peerOf(h.site)]
		h.w.send(h.site, peer.site, func() {
			if peer.alive() {
				h.w.send(peer.site, h.site, back(peer.site, h.w.answer(peer.standing, h.site, epoch)))
			}
		})
	}
	if h.runs() && h.w.sendsPoints(h.standing) {
		epoch, contested := h.standing.Epoch, h.standing.Contested
		peer := h.w.hosts[peerOf(h.site)]
		h.w.send(h.site, peer.site, func() {
			if !peer.alive() || h.w.acceptsPoint(peer.standing, epoch) != nil {
				return
			}
			h.w.points++
			h.w.books.point(h.site, peer, epoch, contested)
			if epoch > peer.standing.Epoch {
				peer.standing = h.w.become(peer.standing, RoleTarget, epoch)
			}
		})
	}
}

// act carries out what is decided now.
func (h *simHost) act() {
	d := h.w.decide(h.standing, h.moment())
	switch d.Act {
	case ActStop:
		if d.State == StateLeaseEnded || d.State == StateHeld {
			h.late(func() { h.stop(string(d.State)); h.byLease = true })
		} else if d.State == StateSuperseded && h.standing.Role == RoleSource && h.w.chance(0.5) {
			h.fenced() // durable first: what is left to do is to turn it off
			h.tryStop(string(d.State))
			return
		} else if !h.tryStop(string(d.State)) {
			return
		}
	case ActSuspend:
		h.late(func() { h.paused = h.running })
	case ActGrant:
		h.grant = d.Grant
		if d.Grant.By == ByPolicy {
			h.w.books.confirmed(h, h.standing.Epoch)
		}
	}
	d = h.w.decide(h.standing, h.moment())
	if d.State == StateSuperseded || d.State == StateElsewhere {
		h.grant = Grant{}
	}
	if d.State == StateSuperseded && h.standing.Role == RoleSource {
		h.fenced()
	}
	if d.MayStart && h.standing.Role.Owns() {
		if h.paused {
			h.start("lease renewed")
		}
		if h.autostart && !h.autoDone || h.byLease {
			h.start("granted")
		}
		h.autoDone, h.byLease = true, false
	}
}

// fenced: what it heard makes it the side where the VM is not active.
func (h *simHost) fenced() {
	h.grant = Grant{}
	h.standing = h.w.become(h.standing, RoleFenced, h.standing.Heard.Epoch)
	h.w.note("%s: fenced under epoch %d by what it heard", h.site, h.standing.Epoch)
}

// late stops a VM with the delay that the bound allows, whoever does it: the
// agent, or the guard beside it.
func (h *simHost) late(stop func()) {
	boots := h.boots
	h.w.after(h.w.between(0, StopWithin*9/10), func() {
		if h.boots == boots && h.running && !h.w.decide(h.standing, h.moment()).MayStart {
			stop()
		}
	})
}

// guard is the process that ends leases while the agent is dead.
func (h *simHost) guard() {
	if h.hostUp && h.grant.Until != 0 && h.clock() >= h.grant.Until && h.running && !h.paused {
		h.late(func() { h.stop("guard"); h.byLease = true })
	}
}

func (h *simHost) hear(r Ruling, asked Instant, by switchback.SiteID) {
	h.w.books.told(h.site, r)
	was := h.standing
	next, heard := h.w.hear(h.standing, r)
	h.standing = next
	h.heardFrom = h.w.now
	if heard == HeardConfirmed && !next.Contested {
		if g := h.w.confirm(next, h.boot(), asked, h.clock(), string(by)); g.Renews(h.grant) {
			h.grant = g
		}
		h.w.books.confirmed(h, next.Epoch)
	}
	if was != next {
		h.w.note("%s: hears %+v from %s: %s", h.site, r, by, heard)
	}
	h.act()
}

// command is what the server asks for; ok tells it that the effect has happened.
type command struct {
	kind   string
	epoch  switchback.Epoch
	site   switchback.SiteID // who is active, for fence and abandon
	proven bool              // activate: the old side is off
	run    bool              // reinstate: start it
}

func (h *simHost) obey(c command) (ok bool) {
	if err := h.w.admit(h.standing, c.epoch); err != nil {
		h.w.note("%s: refuses %s: %v", h.site, c.kind, err)
		return false
	}
	h.w.books.told(h.site, Ruling{c.epoch, c.site})
	if c.site != h.site && c.kind != "fence" && c.kind != "settle" {
		h.standing, _ = h.w.hear(h.standing, Ruling{c.epoch, c.site})
	}
	role := h.standing.Role
	become := func(r Role) {
		if role != r || h.standing.Epoch != c.epoch {
			h.w.note("%s: %s: %s under epoch %d", h.site, c.kind, r, c.epoch)
		}
		h.standing = h.w.become(h.standing, r, c.epoch)
	}
	allow := func(by string) bool {
		if h.standing.Policy.Lease > 0 {
			d := h.w.decide(h.standing, h.moment())
			return d.MayStart // the agent asks in its own rounds
		}
		h.grant = Grant{Epoch: h.standing.Epoch, Boot: h.boot(), By: by}
		h.w.books.confirmed(h, h.standing.Epoch)
		h.autoDone = true
		return true
	}
	switch c.kind {
	case "shutdown":
		if role != RoleSource {
			return false
		}
		h.stop("shutdown")
		h.byLease, h.autoDone, h.standing.Leaving = false, true, true
	case "fence":
		if role == RoleSource && h.running {
			return false
		}
		if role != RoleSource && role != RoleFenced {
			return false
		}
		become(RoleFenced)
		h.grant = Grant{}
	case "activate":
		if role != RoleTarget && role != RoleActive {
			return false
		}
		if role == RoleTarget {
			var takeover *Takeover
			if wait := TakeoverWait(h.standing.Policy); !c.proven && wait > 0 {
				takeover = &Takeover{Epoch: c.epoch, Boot: h.boot(), Since: h.clock(), Wait: wait}
			}
			become(RoleActive)
			h.standing.Takeover = takeover
		}
	case "start":
		if role != RoleActive || h.standing.Epoch != c.epoch {
			return false
		}
		if h.w.decide(h.standing, h.moment()).State == StateTakingOver || !allow(ByCommand) {
			return false
		}
		h.standing.Takeover, h.autostart = nil, true
		h.start("command")
	case "abandon":
		if role != RoleActive && role != RoleTarget {
			return false
		}
		h.stop("abandoned")
		become(RoleTarget)
		h.grant = Grant{}
	case "reinstate":
		if role != RoleSource && role != RoleFenced {
			return false
		}
		become(RoleSource)
		if c.run {
			if !allow(ByCommand) && !h.runs() {
				return false
			}
			h.start("reinstated")
		}
	case "replica":
		if role == RoleTarget && h.standing.Epoch == c.epoch {
			return true
		}
		if role.Owns() || h.running {
			return false
		}
		become(RoleTarget)
	case "replicate":
		if !role.Owns() {
			return false
		}
		become(RoleSource)
	case "settle": // a winner is named
		if c.site != h.site && h.standing.Contested {
			h.stop("the other side has won")
		}
		h.standing.Contested = false
	}
	return true
}

// reboot takes the power from a host; it comes back after a while.
func (h *simHost) reboot(away time.Duration) {
	h.w.note("%s: power lost for %v", h.site, away.Round(time.Second))
	h.hostUp, h.agentUp = false, false
	h.stop("power")
	h.w.after(away, func() {
		h.hostUp, h.boots, h.bootedAt = true, h.boots+1, h.w.now
		if !h.w.keepRun {
			h.grant = Grant{}
		}
		h.hasUp, h.autoDone, h.byLease = false, false, false
		h.w.books.booted(h)
		h.w.note("%s: booted", h.site)
		h.w.after(h.w.between(0, 5*time.Second), h.startAgent)
	})
}

func (h *simHost) startAgent() {
	if h.hostUp && !h.agentUp {
		h.agentUp = true
		if h.stuck != 0 {
			h.stuck = h.w.now
		}
		h.life++
		h.done = map[string]bool{}
		h.round(h.life)
	}
}

// round repeats while this life of the agent lasts.
func (h *simHost) round(life int) {
	if !h.alive() || h.life != life {
		return
	}
	h.look()
	h.w.after(h.w.between(tick/2, tick*3/2), func() { h.round(life) })
}

// simServer mints epochs and drives operations, each step again and again until it is done.
type simServer struct {
	w    *world
	up   bool
	p    switchback.Protection // durable
	op   *simOp                // durable
	life int
	sent []sentCommand
}

// sentCommand is what a server that was asleep since may send again.
type sentCommand struct {
	to switchback.SiteID
	c  command
}

type simOp struct {
	kind  string
	step  int
	id    int
	since time.Duration
	acked bool // of the present step
	ended bool
	ready bool // the step's intention is durable
}

func (s *simServer) startServer() {
	if !s.up {
		s.up = true
		s.life++
		s.round(s.life)
	}
}

func (s *simServer) round(life int) {
	if !s.up || s.life != life {
		return
	}
	s.work()
	s.w.after(s.w.between(300*time.Millisecond, time.Second), func() { s.round(life) })
}

// begin takes up an operation if none is under way.
func (s *simServer) begin(kind string) {
	if !s.up || s.op != nil {
		return
	}
	fits := map[string]switchback.Phase{"failover": switchback.PhaseProtected, "forced": switchback.PhaseProtected,
		"undo": switchback.PhaseSwitched, "reprotect": switchback.PhaseSwitched}
	if s.p.Phase != fits[kind] {
		return
	}
	s.w.seq++
	s.op = &simOp{kind: kind, id: s.w.seq, since: s.w.now}
	if kind == "failover" || kind == "forced" {
		s.p.Phase = switchback.PhaseSwitching
		s.p.Switch = &switchback.Switch{From: s.p.Source, To: s.p.Target, PreviousEpoch: s.p.Epoch}
	}
	s.w.note("server: %s begins", kind)
}

// ask sends the step's command; its answer moves the operation on.
func (s *simServer) ask(to switchback.SiteID, c command) {
	op, kind, step := s.op, s.op.kind, s.op.step
	s.sent = append(s.sent, sentCommand{to, c})
	h := s.w.hosts[to]
	// A connection does not outlive an agent, and a task that is done is not done
	// again by the agent that has done it.
	life, key := h.life, fmt.Sprintf("%d/%s/%d", op.id, op.kind, step)
	s.w.send(theServer, to, func() {
		if !h.alive() || h.life != life {
			return
		}
		if !h.done[key] {
			h.done[key] = h.obey(c)
			h.act()
		}
		if !h.done[key] {
			return
		}
		s.w.send(to, theServer, func() {
			if s.up && s.op == op && op.kind == kind && op.step == step {
				op.step++
				op.since, op.ready = s.w.now, false
			}
		})
	})
}

func (s *simServer) mint() switchback.Epoch {
	s.p.Epoch++
	return s.p.Epoch
}

func (s *simServer) minted() { s.w.books.minted(Rule(s.p)) }

func (s *simServer) end(kind string) {
	s.w.note("server: %s ended, %s at %s under epoch %d", kind, s.p.Phase, s.p.Source, s.p.Epoch)
	s.op = nil
	s.w.moves++
}

// undo turns the operation into its undo.
func (s *simServer) undo() {
	s.w.note("server: %s is undone", s.op.kind)
	s.op.kind, s.op.step, s.op.since, s.op.ready = "undo", 0, s.w.now, false
}

func (s *simServer) work() {
	if s.op == nil {
		return
	}
	sw, op := s.p.Switch, s.op
	waited := s.w.now - op.since
	switch op.kind {
	case "failover": // planned: the old side is seen off, and fenced, before
		switch op.step {
		case 0:
			s.ask(sw.From, command{kind: "shutdown", epoch: s.p.Epoch, site: sw.From})
			if waited > 20*time.Second {
				s.undo()
			}
		case 1:
			if sw.Epoch == 0 {
				sw.Epoch = s.mint()
				s.minted()
			}
			s.ask(sw.From, command{kind: "fence", epoch: sw.Epoch, site: sw.To})
			if waited > 20*time.Second {
				s.undo()
			}
		default:
			s.newSide(true, waited)
		}
	case "forced": // the old side is asked, and not waited for
		if op.step == 0 {
			if sw.Epoch == 0 {
				sw.Epoch = s.mint()
				s.minted()
			}
			op.step = 2
		}
		if op.step >= 2 {
			s.newSide(false, waited)
		}
	case "undo":
		if sw.UndoEpoch == 0 {
			s.p.Phase = switchback.PhaseUndoing
			sw.UndoEpoch = s.mint()
			s.minted()
		}
		switch op.step {
		case 0:
			s.ask(sw.To, command{kind: "abandon", epoch: sw.UndoEpoch, site: sw.From})
		case 1:
			s.ask(sw.From, command{kind: "reinstate", epoch: sw.UndoEpoch, site: sw.From, run: true})
		default:
			s.p.Source, s.p.Target, s.p.Phase, s.p.Switch = sw.From, sw.To, switchback.PhaseProtected, nil
			s.end("undo")
		}
	case "reprotect": // commit and the other direction
		switch op.step {
		case 0:
			s.ask(s.p.Target, command{kind: "replica", epoch: s.p.Epoch, site: s.p.Source})
		case 1:
			s.ask(s.p.Source, command{kind: "replicate", epoch: s.p.Epoch, site: s.p.Source})
		default:
			s.p.Phase, s.p.Switch = switchback.PhaseProtected, nil
			s.end("reprotect")
		}
	}
}

// newSide is the half of a switch at the new side.
func (s *simServer) newSide(proven bool, waited time.Duration) {
	sw, op := s.p.Switch, s.op
	switch op.step {
	case 2:
		s.ask(sw.To, command{kind: "activate", epoch: sw.Epoch, site: sw.To, proven: proven})
	case 3:
		s.ask(sw.To, command{kind: "start", epoch: sw.Epoch, site: sw.To})
		if waited > 2*time.Minute && !s.w.calm {
			s.undo()
		}
	default:
		s.p.Source, s.p.Target, s.p.Phase = sw.To, sw.From, switchback.PhaseSwitched
		s.end(op.kind)
	}
}

// newWorld is a protected VM that runs at site a, and everybody up.
func newWorld(seed uint64, r rules) *world {
	w := &world{rules: r, rnd: rand.New(rand.NewPCG(seed, 4)), cut: map[link]bool{}, hosts: map[switchback.SiteID]*simHost{}}
	w.lossy = w.rnd.Float64() * 0.3
	w.slow, w.tardy = w.between(time.Second, 40*time.Second), w.rnd.Float64()*0.4
	switch w.rnd.IntN(5) {
	case 0, 1:
		w.policy.Lease = w.between(10*time.Second, 40*time.Second)
		if w.chance(0.5) {
			w.policy.OnLeaseEnd = switchback.LeaseEndSuspend
		}
	case 2:
		w.policy.StartUnconfirmedAfter = w.between(20*time.Second, 2*time.Minute)
	}
	w.books = newBooks(w)
	w.server = &simServer{w: w, p: switchback.Protection{Home: siteA, Source: siteA, Target: siteB, Phase: switchback.PhaseProtected, Epoch: 1}}
	for _, site := range []switchback.SiteID{siteA, siteB} {
		h := &simHost{w: w, site: site, rate: 1 + (w.rnd.Float64()-0.5)/Drift, hostUp: true, autostart: true,
			standing: Standing{Site: site, Role: RoleTarget, Epoch: 1, Policy: w.policy}}
		w.hosts[site] = h
	}
	a := w.hosts[siteA]
	a.standing.Role, a.autoDone = RoleSource, true
	a.grant = Confirm(a.standing, a.boot(), 0, string(theServer))
	w.books.minted(Rule(w.server.p))
	w.books.confirmed(a, 1)
	a.start("protected")
	for _, h := range w.hosts {
		w.books.told(h.site, Ruling{1, siteA})
	}
	for _, site := range []switchback.SiteID{siteA, siteB} {
		w.hosts[site].startAgent()
		w.guards(w.hosts[site])
	}
	w.server.startServer()
	return w
}

func (w *world) guards(h *simHost) {
	w.after(time.Second/2, func() { h.guard(); w.guards(h) })
}

// chaos does one harm, and the next.
func (w *world) chaos() {
	if w.calm {
		return
	}
	sites := []switchback.SiteID{siteA, siteB, theServer}
	h := w.hosts[sites[w.rnd.IntN(2)]]
	switch w.rnd.IntN(12) {
	case 0, 1, 2: // a cut, one way or both, of one pair or of all of a site
		x, y := sites[w.rnd.IntN(3)], sites[w.rnd.IntN(3)]
		links := []link{{x, y}}
		if w.chance(0.7) {
			links = append(links, link{y, x})
		}
		if w.chance(0.4) {
			for _, z := range sites {
				links = append(links, link{x, z}, link{z, x})
			}
		}
		for _, l := range links {
			w.cut[l] = true
		}
		w.note("cut %v", links)
		w.after(w.between(time.Second, 90*time.Second), func() {
			for _, l := range links {
				delete(w.cut, l)
			}
		})
	case 3: // the agent dies
		if h.agentUp {
			w.note("%s: agent killed", h.site)
			h.agentUp = false
			w.after(w.between(0, time.Minute), h.startAgent)
		}
	case 4:
		if h.hostUp {
			h.reboot(w.between(time.Second, time.Minute))
		}
	case 5: // the server dies
		if w.server.up {
			w.note("server killed")
			w.server.up = false
			w.after(w.between(0, 40*time.Second), w.server.startServer)
		}
	case 6: // virsh start by hand
		if h.hostUp && !h.running {
			ok := h.hook()
			w.note("%s: virsh start: %v", h.site, ok)
			if ok {
				h.start("by hand")
			}
		}
	case 7:
		w.server.begin("failover")
	case 8: // often because the old side is cut off
		old, target := w.server.p.Source, w.hosts[w.server.p.Target]
		w.server.begin("forced")
		if w.chance(0.4) {
			w.isolate(old, w.between(10*time.Second, 90*time.Second), w.chance(0.5))
			if w.chance(0.5) {
				w.after(w.between(time.Second, 10*time.Second), func() {
					if target.hostUp && !w.calm {
						target.reboot(w.between(time.Second/10, 10*time.Second))
					}
				})
			}
		}
	case 9:
		w.server.begin([]string{"undo", "reprotect"}[w.rnd.IntN(2)])
	case 11: // another server wakes up that knows of an older epoch only
		if sent := w.server.sent; len(sent) > 0 {
			old := sent[w.rnd.IntN(len(sent))]
			if to := w.hosts[old.to]; old.c.epoch < w.server.p.Epoch && to.alive() {
				w.note("%s: an old server asks for %s under epoch %d", to.site, old.c.kind, old.c.epoch)
				to.obey(old.c)
				to.act()
			}
		}
	case 10: // an override, where nobody has been heard for long
		if h.alive() && !h.running && w.chance(0.3) && w.now-h.heardFrom > 30*time.Second && h.standing.Role.Owns() && h.standing.Takeover == nil && !h.standing.Leaving {
			w.note("%s: override", h.site)
			h.standing.Contested = true
			h.act()
			if h.hook() {
				h.start("override")
			}
		}
	}
	w.after(w.between(200*time.Millisecond, 20*time.Second), w.chaos)
}

// isolate cuts a site off from everybody for a while: nothing gets out, and
// perhaps nothing in.
func (w *world) isolate(x switchback.SiteID, d time.Duration, deaf bool) {
	w.note("%s is cut off for %v, deaf: %v", x, d.Round(time.Second), deaf)
	var links []link
	for _, z := range []switchback.SiteID{siteA, siteB, theServer} {
		links = append(links, link{x, z})
		if deaf {
			links = append(links, link{z, x})
		}
	}
	for _, l := range links {
		w.cut[l] = true
	}
	w.after(d, func() {
		for _, l := range links {
			delete(w.cut, l)
		}
	})
}

// heal ends all faults and lets operators settle what they began.
func (w *world) heal() {
	w.calm = true
	w.note("all is healed")
	clear(w.cut)
	for _, h := range w.hosts {
		if h.hostUp {
			h.startAgent()
		}
	}
	w.server.startServer()
	w.after(time.Minute, w.settle)
	w.after(3*time.Minute, func() { w.server.begin("reprotect") })
}

// settle names the winner of a contest: the site that the server's record says.
func (w *world) settle() {
	for _, h := range w.hosts {
		if h.standing.Contested && h.alive() {
			r := Rule(w.server.p)
			w.note("server: %s is named the winner", r.Site)
			if h.obey(command{kind: "settle", epoch: max(r.Epoch, h.standing.Newest()), site: r.Site}) {
				h.act()
			}
		}
	}
}

// simulate runs a seed and returns what it violated; nil = nothing.
func simulate(seed uint64, r rules) (violations []string, w *world) {
	w = newWorld(seed, r)
	w.after(w.between(0, 10*time.Second), w.chaos)
	w.after(chaosFor, w.heal)
	for w.now <= chaosFor+calmFor && len(w.books.violations) == 0 {
		e := heap.Pop(&w.events).(event)
		w.now = e.at
		e.do()
		w.books.check()
	}
	if len(w.books.violations) == 0 {
		w.books.live()
	}
	return w.books.violations, w
}

func (w *world) story() string { return strings.Join(w.trace, "\n") }
