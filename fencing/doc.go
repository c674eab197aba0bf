// Package fencing decides who may be active: which site may run a protected VM,
// send its points and start it. It is pure; the agent carries out what it says,
// the server answers questions of ownership by it, and the simulation in its
// tests drives these very functions over a network that loses, delays and
// repeats messages.
//
// An epoch is a number and the site that is active under it. The server mints
// it, one for each change. From that follow the rules:
//
//	Admit         a message with an older epoch than the newest heard of is refused
//	AcceptsPoint  a target takes points of its own epoch or a newer one, from its source only
//	Hear          an answer about ownership confirms (this epoch, this site), supersedes
//	              (newer, another site), or is too old to mean anything
//	Decide        a start needs a grant: a note of this boot, this epoch and, with the
//	              lease policy, not beyond its end. No grant: the VM is held. Superseded,
//	              or the lease has ended: a VM that runs is turned off
//	Takeover      with the lease policy, and without proof that the old side is off, the
//	              new side starts once every lease that the old side can hold has ended
//
// What is durable at an agent is a Standing. A Grant is not: a reboot removes it,
// and whoever boots asks again. An override by hand lets a VM run with nobody's
// confirmation; it makes the VM contested, and a contested source sends no points.
//
// Without the lease policy a source that hears from nobody goes on: two copies
// may then run, under different epochs, until it hears. The caller says so before.
//
// Time here is an Instant, counted by the host's own clock from its boot, so that
// setting a clock moves no lease. Clocks of hosts may differ in rate by Drift.
package fencing
