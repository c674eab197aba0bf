package simlab

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

// Place is where a process of a lab runs, and how the others get at it there.
type Place struct {
	// Enter is put before its command line, "ip netns exec NAME"; nil = nothing.
	Enter []string
	// Host is the address it listens on and is reached at; "" = loopback.
	Host string
	// Unreachable: nobody can open a connection to it. Auto: an agent finds that out.
	Unreachable, Auto bool
}

// placedPort is where a process in a namespace of its own listens.
const placedPort = 7443

func (p Place) command(name string, args ...string) *exec.Cmd {
	all := append(append([]string{}, p.Enter...), append([]string{name}, args...)...)
	return exec.Command(all[0], all[1:]...)
}

// join lets the agent of a site join: by token, or by hand where the server is
// out of its reach.
func (l *Lab) join(ctx context.Context, client *api.Client, site string) error {
	place := l.cfg.Places[site]
	how := []string{"--address", l.address(site)}
	switch {
	case place.Unreachable:
		how = []string{"--reachable=false"}
	case place.Auto:
		how = append(how, "--reachable=auto")
	}
	agent := func(sub string, args ...string) ([]byte, error) {
		out, err := place.command(l.cfg.Executable, append([]string{"agent", sub, "--state", l.StateDir(site)}, args...)...).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("agent %s: %w: %s", sub, err, out)
		}
		return out, nil
	}
	if l.cfg.Places[Server].Unreachable {
		request, err := agent("request", how...)
		if err != nil {
			return err
		}
		answer, err := client.AdmitAgent(ctx, switchback.SiteID(site), string(request))
		if err != nil {
			return err
		}
		_, err = agent("join", answer.Answer)
		return err
	}
	token, err := client.MintToken(ctx, switchback.SiteID(site), 10*time.Minute)
	if err != nil {
		return err
	}
	_, err = agent("join", append(how, token.Token)...)
	return err
}
