package agent

import (
	"errors"
	"io/fs"
	"os"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// Request returns a request to join for an agent that cannot reach the server;
// how it is reached is kept beside the key, for JoinByHand.
func Request(stateDir, address string, reachable agentapi.Reachable, version string) (string, error) {
	if err := checkReachable(reachable, address); err != nil {
		return "", err
	}
	_, csr, err := joinKey(stateDir)
	if err != nil {
		return "", err
	}
	if reachable == agentapi.ReachableNo {
		id, err := transport.AgentIDFor(csr)
		if err != nil {
			return "", err
		}
		address = transport.AgentName(id)
	}
	if err := saveIdentity(stateDir, Identity{Address: address, Reachable: reachable}); err != nil {
		return "", err
	}
	host, err := os.Hostname()
	if err != nil {
		return "", err
	}
	return transport.JoinText(transport.RequestPrefix, transport.JoinRequest{CSRPEM: string(csr),
		Agent: transport.AgentInfo{Address: address, Version: version, Hostname: host}}), nil
}

// JoinByHand completes what Request began with the answer of the server.
func JoinByHand(stateDir, answer string) (transport.Identity, error) {
	resp, err := transport.ParseJoinText[transport.JoinResponse](transport.AnswerPrefix, answer)
	if err != nil {
		return transport.Identity{}, err
	}
	keyFile, _ := joinFiles(stateDir)
	key, err := os.ReadFile(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return transport.Identity{}, switchback.Errorf(switchback.CodeRefused, "this agent has made no request to join").WithHint("switchback agent request")
	}
	if err != nil {
		return transport.Identity{}, err
	}
	asked, err := readIdentity(stateDir)
	if err != nil {
		return transport.Identity{}, err
	}
	asked.Server = resp.Server
	return settleJoin(stateDir, key, resp, asked)
}
