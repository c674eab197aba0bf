package switchback

import "time"

// CheckKind says how a guest is checked.
type CheckKind string

const (
	// CheckPower: the VM is running, and still is after a while. No target.
	CheckPower CheckKind = "power"
	// CheckAgent: the guest agent answers. No target.
	CheckAgent CheckKind = "agent"
	// CheckConsole: the guest says something on its serial console that
	// matches the target, a regular expression.
	CheckConsole CheckKind = "console"
	// CheckTCP: the target, host:port, takes a connection.
	CheckTCP CheckKind = "tcp"
	// CheckHTTP: the target, a URL, answers with a status below 400.
	CheckHTTP CheckKind = "http"
	// CheckICMP: the target, an address, answers an echo request.
	CheckICMP CheckKind = "icmp"
	// CheckExec: the target, a command run by the guest agent, ends with status 0.
	CheckExec CheckKind = "exec"
)

// GuestCheck is one check of a guest that was started. Package check reads and
// writes its text form and runs it.
type GuestCheck struct {
	Kind   CheckKind `json:"kind"`
	Target string    `json:"target,omitempty"`
	// Timeout is how long after the start of the checks it may take to pass,
	// attempts included; 0 = 2 min.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Retries is how often it is tried again; 0 = as often as the time allows.
	Retries int `json:"retries,omitempty"`
	// Optional: reported, but of no consequence.
	Optional bool `json:"optional,omitempty"`
}

// CheckResult is how a check ended.
type CheckResult struct {
	// Check is its text form.
	Check    string    `json:"check"`
	Kind     CheckKind `json:"kind"`
	Required bool      `json:"required"`
	Passed   bool      `json:"passed"`
	Attempts int       `json:"attempts"`
	// StartedAt and EndedAt are of the first and the last attempt.
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	// Detail is what was seen: a line, a status, a time.
	Detail string `json:"detail,omitempty"`
	// Error says why it did not pass.
	Error string `json:"error,omitempty"`
}
