// Package killpoint ends the process at a named line, for tests of what happens
// then. Lines are marked in the code that persists intentions and outcomes, and
// cost a comparison where nothing is armed:
//
//	killpoint.At("server", "failover", "fence", killpoint.BeforeEffect)
//
// What is armed is a spec, "PROCESS:SCOPE/STEP:LINE", where SCOPE may be "*". A
// spec given itself is for ever. A directory holds a spec in each file *.spec,
// which is for once: it is renamed to *.hit before the process dies. A spec
// that begins with "hold " does not kill: the line waits until the *.hit is
// removed, so that something else can be killed meanwhile.
package killpoint

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Line is where in a step.
type Line string

const (
	BeforeEffect Line = "before-effect" // the intention is durable
	Within       Line = "within-effect" // a part of it is done; not every step has such a line
	AfterEffect  Line = "after-effect"  // the outcome is not known to anybody else
	AfterOutcome Line = "after-outcome" // it is durable, or told
)

// Lines are those of every step, in order.
var Lines = []Line{BeforeEffect, AfterEffect, AfterOutcome}

// Environment is the variable that cmd/switchback arms the process with.
const Environment = "SWITCHBACK_KILL"

var armed string

// Arm sets the spec, or the directory of specs; "" = none. Called once, before
// anything else runs.
func Arm(with string) { armed = with }

// Armed reports whether there is something that may be hit.
func Armed() bool { return armed != "" }

// At is a line that may be the last.
func At(process, scope, step string, line Line) {
	if armed == "" {
		return
	}
	if !strings.HasPrefix(armed, "/") {
		if matches(armed, process, scope, step, line) {
			die()
		}
		return
	}
	specs, _ := filepath.Glob(filepath.Join(armed, "*.spec")) // a constant pattern
	for _, file := range specs {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // another line has taken it
		}
		spec, hold := strings.CutPrefix(strings.TrimSpace(string(b)), "hold ")
		if !matches(spec, process, scope, step, line) {
			continue
		}
		hit := strings.TrimSuffix(file, ".spec") + ".hit"
		if os.Rename(file, hit) != nil {
			continue
		}
		if !hold {
			die()
		}
		for {
			if _, err := os.Stat(hit); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// Spec is the text that arms a line.
func Spec(process, scope, step string, line Line) string {
	return process + ":" + scope + "/" + step + ":" + string(line)
}

func matches(spec, process, scope, step string, line Line) bool {
	return spec == Spec(process, scope, step, line) || spec == Spec(process, "*", step, line)
}

// die does not return: nothing runs after kill -9, no deferred call and no other goroutine.
func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
