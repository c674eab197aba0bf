package fencing

import (
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// books are the checker's own. They are kept from what the world does, not from
// what the rules say.
type books struct {
	w *world
	// owner of each epoch, as minted.
	owner map[switchback.Epoch]switchback.SiteID
	// heard is the newest epoch that each agent was told of, with the site where it was named.
	heard map[switchback.SiteID]Ruling
	// sure is the epoch that was confirmed to a site in its present boot; 0 = none.
	sure map[switchback.SiteID]switchback.Epoch
	// lastPoint is when each site's replica took one.
	lastPoint  map[switchback.SiteID]time.Duration
	violations []string
}

func newBooks(w *world) *books {
	return &books{w: w, owner: map[switchback.Epoch]switchback.SiteID{}, heard: map[switchback.SiteID]Ruling{},
		sure: map[switchback.SiteID]switchback.Epoch{}, lastPoint: map[switchback.SiteID]time.Duration{}}
}

func (b *books) violated(format string, args ...any) {
	b.violations = append(b.violations, fmt.Sprintf("at %.3f s: ", b.w.now.Seconds())+fmt.Sprintf(format, args...))
}

func (b *books) minted(r Ruling) {
	if was, ok := b.owner[r.Epoch]; ok && was != r.Site {
		b.violated("epoch %d is minted for %s and for %s", r.Epoch, was, r.Site)
	}
	b.owner[r.Epoch] = r.Site
}

func (b *books) told(site switchback.SiteID, r Ruling) {
	if r.Epoch > b.heard[site].Epoch || r.Epoch == b.heard[site].Epoch && r.Site != "" {
		b.heard[site] = r
	}
}

func (b *books) confirmed(h *simHost, e switchback.Epoch) { b.sure[h.site] = e }
func (b *books) booted(h *simHost)                        { b.sure[h.site] = 0 }

// started: nobody starts a VM that was not confirmed to it since its host booted.
func (b *books) started(h *simHost, fresh bool) {
	if fresh && !h.standing.Contested && b.sure[h.site] != h.standing.Epoch {
		b.violated("%s starts the VM under epoch %d, which nobody has confirmed to it in this boot", h.site, h.standing.Epoch)
	}
}

// point: only of the site that the epoch was minted for, not of a contested one,
// and not once the target has been told of a newer epoch.
func (b *books) point(from switchback.SiteID, target *simHost, e switchback.Epoch, contested bool) {
	b.lastPoint[target.site] = b.w.now
	switch {
	case b.owner[e] != from:
		b.violated("%s takes a point of %s under epoch %d, which is %s's", target.site, from, e, b.owner[e])
	case contested:
		b.violated("%s takes a point of %s, which is contested", target.site, from)
	case b.heard[target.site].Epoch > e:
		b.violated("%s takes a point of %s under epoch %d, though it was told of %d", target.site, from, e, b.heard[target.site].Epoch)
	case target.standing.Role.Owns():
		b.violated("%s takes a point under epoch %d while it is active", target.site, e)
	}
	b.told(target.site, Ruling{e, from})
}

// check looks at the whole world after each event.
func (b *books) check() {
	var running []*simHost
	for _, site := range []switchback.SiteID{siteA, siteB} {
		if h := b.w.hosts[site]; h.runs() && !h.standing.Contested && !h.stopping() {
			running = append(running, h)
		}
	}
	for _, h := range running {
		if r := b.heard[h.site]; h.alive() && r.Epoch > h.vmEpoch && r.Epoch > h.standing.Epoch && r.Site != "" && r.Site != h.site {
			b.violated("%s runs the VM under epoch %d, though it was told that %s is active under %d", h.site, h.vmEpoch, r.Site, r.Epoch)
		}
		if b.owner[h.standing.Epoch] != h.site {
			b.violated("%s runs the VM and holds epoch %d, which is %s's", h.site, h.standing.Epoch, b.owner[h.standing.Epoch])
		}
	}
	if len(running) < 2 {
		return
	}
	x, y := running[0], running[1]
	switch {
	case x.standing.Epoch == y.standing.Epoch:
		b.violated("both sites run the VM under epoch %d", x.standing.Epoch)
	case b.w.policy.Lease > 0:
		b.violated("both sites run the VM, under epochs %d and %d, in spite of a lease of %v", x.standing.Epoch, y.standing.Epoch, b.w.policy.Lease)
	}
}

// live: a while after all was healed the VM runs where the server says, and there
// only, nothing is under way, and points are taken.
func (b *books) live() {
	s := b.w.server
	r := Rule(s.p)
	if s.op != nil {
		b.violated("%s is still under way, at step %d", s.op.kind, s.op.step)
		return
	}
	for _, site := range []switchback.SiteID{siteA, siteB} {
		h := b.w.hosts[site]
		if h.runs() != (site == r.Site) {
			b.violated("%s runs: %v, it is to run at %s under epoch %d; %s is %+v", site, h.runs(), r.Site, r.Epoch, site, h.standing)
		}
	}
	if s.p.Phase == switchback.PhaseProtected && b.w.now-b.lastPoint[s.p.Target] > 20*time.Second {
		b.violated("%s has taken no point for %v", s.p.Target, b.w.now-b.lastPoint[s.p.Target])
	}
}
