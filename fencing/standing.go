package fencing

import (
	switchback "github.com/switchback-dr/switchback"
)

// Role is what an agent does for a protected VM.
type Role string

const (
	// RoleSource: the VM is active here and replicated from here.
	RoleSource Role = "source"
	// RoleTarget: the replica is kept here.
	RoleTarget Role = "target"
	// RoleActive: the VM is active here and not replicated: switched or committed.
	RoleActive Role = "active"
	// RoleFenced: the VM is active elsewhere; its copy here must not run.
	RoleFenced Role = "fenced"
)

// Owns reports whether a VM may be active where it has this role.
func (r Role) Owns() bool { return r == RoleSource || r == RoleActive }

// Standing is what an agent durably knows of who may run one VM.
type Standing struct {
	// Site is the agent's own.
	Site switchback.SiteID
	Role Role
	// Epoch is the newest that came with a command or a point.
	Epoch switchback.Epoch
	// Heard is the newest answer to a question of ownership; zero = none yet.
	Heard Ruling
	// Contested: started by hand with nobody's confirmation, or told so.
	Contested bool
	// Leaving: it is being shut down, or was, to be moved; a start now would write
	// what nobody takes along.
	Leaving bool
	// Takeover is set from when this side became active, without proof that the old
	// one is off, until the VM was started; nil = there is nothing to wait for.
	Takeover *Takeover
	Policy   switchback.FencingPolicy
}

// Ruling says who is active under the newest epoch that somebody knows.
type Ruling struct {
	Epoch switchback.Epoch  `json:"epoch"`
	Site  switchback.SiteID `json:"site"`
}

// Newest is the newest epoch that this agent has heard of in any way.
func (s Standing) Newest() switchback.Epoch { return max(s.Epoch, s.Heard.Epoch) }

// Superseded: another site is active under an epoch that is not older.
func (s Standing) Superseded() bool {
	return s.Role.Owns() && s.Heard.Site != "" && s.Heard.Site != s.Site && s.Heard.Epoch >= s.Epoch
}

// Admit refuses a command that is older than what is known: CodeStaleEpoch.
func (s Standing) Admit(e switchback.Epoch) error {
	if e == 0 {
		return switchback.Errorf(switchback.CodeInvalid, "a command without an epoch")
	}
	if known := s.Newest(); e < known {
		return switchback.Errorf(switchback.CodeStaleEpoch, "the command carries epoch %d, this agent knows %d", e, known).
			WithHint("the active site has changed since; look at the VM again")
	}
	return nil
}

// AcceptsPoint refuses a point, or a piece of a first copy, of a source that is
// not the active one as far as is known here: CodeStaleEpoch.
func (s Standing) AcceptsPoint(e switchback.Epoch) error {
	if err := s.Admit(e); err != nil {
		return err
	}
	if s.Role != RoleTarget {
		return switchback.Errorf(switchback.CodeStaleEpoch, "no points are taken here: the role is %s under epoch %d", s.Role, s.Epoch)
	}
	if s.Heard.Site == s.Site && s.Heard.Epoch >= e { // about to be activated
		return switchback.Errorf(switchback.CodeStaleEpoch, "no points are taken here: this site is to be active under epoch %d", s.Heard.Epoch)
	}
	return nil
}

// SendsPoints reports whether a source may take points: not while superseded, nor contested.
func (s Standing) SendsPoints() bool {
	return s.Role == RoleSource && !s.Superseded() && !s.Contested
}

// Become is the standing after a command that gives a role under an epoch.
// Admit must have let it through. What was heard before is answered by it.
func (s Standing) Become(r Role, e switchback.Epoch) Standing {
	if e > s.Epoch {
		s.Contested = false // whoever minted it has named a winner
	}
	if s.Takeover != nil && s.Takeover.Epoch != e {
		s.Takeover = nil
	}
	s.Role, s.Epoch, s.Leaving = r, e, false
	if s.Heard.Epoch <= e {
		s.Heard = Ruling{}
	}
	return s
}

// Hearing is what an answer about ownership amounts to.
type Hearing string

const (
	// HeardNothing: too old, or about somebody else's turn.
	HeardNothing Hearing = "nothing"
	// HeardConfirmed: this site is active under the epoch it holds.
	HeardConfirmed Hearing = "confirmed"
	// HeardPending: a newer epoch makes this site active; the command with it is under way.
	HeardPending Hearing = "pending"
	// HeardSuperseded: another site is active.
	HeardSuperseded Hearing = "superseded"
)

// Hear takes an answer in. The standing returned is durable before anything is
// done about it.
func (s Standing) Hear(r Ruling) (Standing, Hearing) {
	if r.Epoch == 0 || r.Epoch < s.Newest() {
		return s, HeardNothing
	}
	if r.Epoch > s.Epoch || r.Site != s.Site && s.Role.Owns() {
		s.Heard = r
	}
	switch {
	case s.Role.Owns() && r.Site != s.Site:
		return s, HeardSuperseded
	case s.Role.Owns() && r.Epoch == s.Epoch:
		return s, HeardConfirmed
	case r.Site == s.Site:
		return s, HeardPending
	}
	return s, HeardNothing
}

// Answer is what the peer is told that asks about its own turn, under the epoch
// that it holds: only who cannot be active itself confirms it.
func (s Standing) Answer(asker switchback.SiteID, epoch switchback.Epoch) Ruling {
	known := Ruling{Epoch: s.Epoch} // not known whose
	if s.Role.Owns() {
		known.Site = s.Site
	}
	if s.Heard.Epoch > s.Epoch || s.Superseded() {
		known = s.Heard
	}
	if known.Epoch > epoch || s.Role.Owns() && !s.Superseded() {
		return known
	}
	return Ruling{Epoch: epoch, Site: asker}
}

// Rule is the server's answer: who is active under the newest epoch it minted;
// no site where its record does not say whose that epoch is.
func Rule(p switchback.Protection) Ruling {
	r := Ruling{Epoch: p.Epoch, Site: p.Source}
	if sw := p.Switch; sw != nil {
		switch {
		case sw.UndoEpoch != 0 || sw.Epoch == 0:
			r.Site = sw.From
		case sw.Epoch != p.Epoch:
			return Ruling{}
		default:
			r.Site = sw.To
		}
	}
	return r
}
