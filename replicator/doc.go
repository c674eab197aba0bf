// Package replicator carries the changes of one protected VM from its source
// to its target, cycle by cycle.
//
// A cycle reads facts (the domain, its checkpoints, what the target holds,
// what the block index says), decides from them alone what to do (Decide), and
// does it: freeze an instant by a pull-mode backup, read what is dirty, drop
// what the target is known to have, stream one segment, and only when the
// target has answered with the segment's digest move the block index and drop
// the older checkpoint. Nothing is remembered across a crash but these facts,
// so a killed agent goes on from the last match by itself.
//
// Guarantees:
//   - A point exists only when the target has made it durable.
//   - A failed cycle leaves the older checkpoint in place: the next one carries both.
//   - A missing or untrusted bitmap is never papered over: the cycle becomes a
//     resync that reads whole disks and says why.
package replicator
