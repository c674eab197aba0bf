package switchback

import (
	"strings"
	"time"
)

// Mark is what people and checks have said about a recovery point. The point is
// immutable, its mark is not.
type Mark struct {
	// Tag names the point for people; unique within a VM, "" = none.
	Tag string `json:"tag,omitempty"`
	// Locked: never dropped, by no policy and no command, until unlocked.
	Locked bool `json:"locked,omitempty"`
	// Boot is the newest proof that a machine boots from the point.
	Boot *BootProof `json:"boot,omitempty"`
	// Suspicious says why the point may hold damaged data (mass encryption); "" = it is not.
	Suspicious string `json:"suspicious,omitempty"`
}

// BootProof says that a drill booted the point.
type BootProof struct {
	At     time.Time `json:"at"`
	Passed bool      `json:"passed"` // every required check
	Report string    `json:"report"` // the drill's operation
}

// MarkedPoint is a point with its mark.
type MarkedPoint struct {
	Point
	Mark Mark `json:"mark,omitzero"`
}

// ValidTag refuses a tag that could be taken for another way to name a point.
// "" is valid: it removes a tag.
func ValidTag(tag string) error {
	if len(tag) > 64 {
		return Errorf(CodeInvalid, "a tag has at most 64 bytes")
	}
	digits := tag != ""
	for _, c := range tag {
		digits = digits && c >= '0' && c <= '9'
		if c < ' ' || c == 0x7f || c == '/' {
			return Errorf(CodeInvalid, "tag %q: no control characters and no slash", tag)
		}
	}
	if digits || strings.HasPrefix(tag, "latest") || tag == "oldest" || strings.TrimSpace(tag) != tag {
		return Errorf(CodeInvalid, "tag %q would be taken for another way to name a point", tag).WithHint("choose another word")
	}
	return nil
}
