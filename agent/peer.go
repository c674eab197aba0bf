package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/transport"
)

const epochHeader = "Switchback-Epoch"

// peerTarget is the replica at the peer agent.
type peerTarget struct {
	client     *http.Client
	peer       agentapi.Peer
	protection switchback.ProtectionID
}

var _ replicator.Target = (*peerTarget)(nil)

func (t *peerTarget) url(suffix string) string {
	return "https://" + t.peer.Address + "/v1/replicas/" + string(t.protection) + suffix
}

func (t *peerTarget) State(ctx context.Context) (replicator.TargetState, error) {
	return transport.Call[replicator.TargetState](ctx, t.client, http.MethodGet, t.url(""), nil)
}

// stream posts a body of unknown length and decodes the answer.
func stream[R any](ctx context.Context, t *peerTarget, suffix string, epoch switchback.Epoch, body io.Reader) (R, error) {
	var zero R
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url(suffix), body)
	if err != nil {
		return zero, err
	}
	req.Header.Set(epochHeader, fmt.Sprint(uint64(epoch)))
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := transport.Do(t.client, req)
	if err != nil {
		return zero, err
	}
	defer resp.Body.Close()
	var answer R
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return zero, switchback.Errorf(switchback.CodeUnavailable, "answer of the target: %w", err)
	}
	return answer, nil
}

func (t *peerTarget) SendPoint(ctx context.Context, e switchback.Epoch, body io.Reader) (switchback.Point, error) {
	return stream[switchback.Point](ctx, t, "/points", e, body)
}

func (t *peerTarget) SendSeed(ctx context.Context, e switchback.Epoch, session string, body io.Reader) error {
	_, err := stream[struct{}](ctx, t, "/seed/"+session, e, body)
	return err
}

func (t *peerTarget) FlushSeed(ctx context.Context, e switchback.Epoch, session string) error {
	_, err := stream[struct{}](ctx, t, "/seed/"+session+"/flush", e, nil)
	return err
}

// sendDefinition tells the target how the VM is defined.
func (t *peerTarget) sendDefinition(ctx context.Context, e switchback.Epoch, d journal.Definition) error {
	_, err := transport.Call[struct{}](ctx, t.client, http.MethodPost, t.url("/definition?epoch="+fmt.Sprint(uint64(e))), d)
	return err
}

func (t *peerTarget) FinishSeed(ctx context.Context, e switchback.Epoch, session string, p switchback.Point) error {
	_, err := transport.Call[struct{}](ctx, t.client, http.MethodPost, t.url("/seed/"+session+"/finish?epoch="+fmt.Sprint(uint64(e))), p)
	return err
}
