package server

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

// sourceDescription is how a VM is defined where it runs.
type sourceDescription struct {
	definition string
	networks   []string
	// agentKnown: agent says whether the guest agent answered.
	agentKnown, agent bool
	// note says where the definition is from, if not from the source.
	note string
}

// describe asks the source; while its agent does not answer, what the target
// keeps with the replica counts. The source's error is returned where there is
// no such.
func (s *Server) describe(ctx context.Context, p switchback.Protection) (sourceDescription, error) {
	var d agentapi.DescribeResult
	a, err := s.store.Agent(ctx, p.SourceAgent)
	if err != nil {
		return sourceDescription{}, err
	}
	if s.agentView(s.ask(ctx, a)).Healthy {
		bounded, cancel := context.WithTimeout(ctx, 20*time.Second)
		t := agentapi.Task{Key: fmt.Sprintf("describe/%s/%d", p.ID, time.Now().UnixNano()), Action: agentapi.ActionDescribe, Protection: p.ID, Epoch: p.Epoch}
		err = s.agentClient(a.ID).Run(bounded, t, agentapi.DescribeParams{VM: p.VM, MustExist: true, AskAgent: true}, &d, nil)
		late := bounded.Err() != nil
		cancel()
		if err == nil {
			return sourceDescription{definition: d.Definition, networks: d.Domain.Networks, agentKnown: true, agent: d.GuestAgent}, nil
		}
		if ctx.Err() != nil || !late && !switchback.IsRetryable(err) {
			return sourceDescription{}, err
		}
	} else {
		err = switchback.Errorf(switchback.CodeUnavailable, "the agent of site %s, which knows the VM's definition, does not answer", p.Source).
			WithHint("start the agent, or mend the network to it")
	}
	var kept journal.Definition
	if kerr := s.askKeeper(ctx, p, agentapi.ActionKeptDefinition, nil, &kept); kerr != nil {
		if switchback.CodeOf(kerr) == switchback.CodeNotFound {
			return sourceDescription{}, err
		}
		return sourceDescription{}, kerr
	}
	return sourceDescription{definition: kept.Text, networks: kept.Networks,
		note: fmt.Sprintf("the definition is the one kept at site %s since %s: site %s does not answer", p.Target, kept.Time.UTC().Format(time.RFC3339), p.Source)}, nil
}

// checksOf are the checks of a drill: those asked for, else the policy's, else
// what any guest can show: that it runs, and that its agent answers where it
// answers at the source. Where that is not known, its silence fails nothing.
func (d sourceDescription) checksOf(asked, policy []switchback.GuestCheck) []switchback.GuestCheck {
	switch {
	case len(asked) > 0:
		return asked
	case len(policy) > 0:
		return policy
	}
	list := []switchback.GuestCheck{{Kind: switchback.CheckPower}}
	if d.agent || !d.agentKnown {
		list = append(list, switchback.GuestCheck{Kind: switchback.CheckAgent, Optional: !d.agentKnown})
	}
	return list
}
