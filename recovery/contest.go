package recovery

import "fmt"

// Resolve ends a contest: a site whose copy of the VM counts is named.
const Resolve Kind = "resolve"

// checkContest decides while a copy of the VM was let start by hand, with nobody's
// confirmation: nothing is done until a winner is named, by itself or by request.
func checkContest(f Facts, k Kind) (Allowed, bool) {
	if len(f.Contested) == 0 {
		if k == Resolve {
			return Allowed{Kind: k, Reason: "no copy of the VM is contested", Remedy: "there is nothing to resolve"}, true
		}
		return Allowed{}, false
	}
	if k == Resolve {
		if !f.SourceUp || !f.TargetUp {
			return Allowed{Kind: k, Reason: "the agents of both sites must answer to settle who has lost", Remedy: "start the agents, or mend the network to them"}, true
		}
		return Allowed{Kind: k, Allowed: true}, true
	}
	return Allowed{Kind: k, Reason: fmt.Sprintf("the VM is contested: it was started at %v by an override", f.Contested),
		Remedy: "name the winner first: switchback vm resolve VM --winner SITE"}, true
}

// CheckRetry decides on a retry of the operation that has failed while the VM is
// contested: only what ends the contest goes on.
func CheckRetry(f Facts) (a Allowed, decided bool) {
	if len(f.Contested) == 0 || f.FailedKind == string(Resolve) {
		return Allowed{}, false
	}
	return checkContest(f, Retry)
}
