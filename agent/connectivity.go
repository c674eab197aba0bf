package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/transport"
)

// legTime bounds the measurement of one leg, apart from the data's own limit.
const legTime = 10 * time.Second

// storageTest is how much is written to measure the storage.
const storageTest = 8 << 20

// routeConnectivity lets the server ask for measurements, and peers measure.
func (a *Agent) routeConnectivity(mux *http.ServeMux) {
	transport.RouteMeasure(mux, a.cfg.Version, transport.RoleServer, transport.RoleAgent)
	mux.Handle("POST /v1/connectivity", transport.RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req agentapi.ConnectivityRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, a.connectivity(r.Context(), req))
	}), transport.RoleServer))
}

// connectivity measures one leg after the other: they would disturb each other.
func (a *Agent) connectivity(ctx context.Context, req agentapi.ConnectivityRequest) agentapi.ConnectivityAnswer {
	answer := agentapi.ConnectivityAnswer{Peers: []agentapi.LegResult{}}
	if a.cfg.ServerAddress != "" {
		answer.Server = measureLeg(ctx, a.server, a.servers.address(), 0, 0)
	}
	for _, p := range req.Peers {
		client := transport.NewHTTPClient(transport.ClientConfig{Credentials: a.cfg.Credentials, Want: transport.Agent(p.Agent), Connections: 1, Inbound: a.reach.inbound})
		answer.Peers = append(answer.Peers, measureLeg(ctx, client, p.Address, req.Bytes, req.Limit))
		client.CloseIdleConnections()
	}
	answer.Hypervisor = a.measureHypervisor(ctx)
	answer.Storage = a.measureStorage(req.Limit)
	return answer
}

func measureLeg(ctx context.Context, client *http.Client, address string, bytes int64, limit time.Duration) agentapi.LegResult {
	ctx, cancel := context.WithTimeout(ctx, legTime+limit)
	defer cancel()
	r := agentapi.LegResult{Address: address}
	var err error
	if r.Measurement, err = transport.Measure(ctx, client, address, bytes, limit); err != nil {
		r.Error = switchback.Flatten(err)
	}
	return r
}

func (a *Agent) measureHypervisor(ctx context.Context) agentapi.LegResult {
	ctx, cancel := context.WithTimeout(ctx, legTime)
	defer cancel()
	var r agentapi.LegResult
	fail := func(err error) agentapi.LegResult {
		r.Error = switchback.Flatten(err)
		if r.Error.Hint == "" {
			r.Error.Hint = "start the hypervisor's daemon, and see that the agent may use its socket"
		}
		return r
	}
	host, err := a.hv.Host(ctx)
	if err != nil {
		return fail(err)
	}
	r.Version = host.Hypervisor
	began := time.Now()
	domains, err := a.hv.Domains(ctx)
	if err != nil {
		return fail(err)
	}
	r.Latency = time.Since(began)
	running := 0
	for _, d := range domains {
		if d.State == hypervisor.StateRunning {
			running++
		}
	}
	r.Detail = fmt.Sprintf("%d VMs, %d running; %d CPUs, %d MiB", len(domains), running, host.CPUs, host.MemoryMiB)
	return r
}

// measureStorage writes a file beside the replicas, as segments are written, and removes it.
func (a *Agent) measureStorage(limit time.Duration) agentapi.LegResult {
	r := agentapi.LegResult{Address: a.cfg.StorageDir}
	free, size := freeBytes(a.cfg.StorageDir)
	r.Detail = fmt.Sprintf("%d of %d MiB free, %d MiB in reserve", free>>20, size>>20, a.cfg.StorageReserveBytes>>20)
	fail := func(err error) agentapi.LegResult {
		r.Error = switchback.Flatten(err)
		if r.Error.Hint == "" {
			r.Error.Hint = "mend the file system of " + a.cfg.StorageDir
		}
		return r
	}
	if free < a.cfg.StorageReserveBytes+storageTest {
		return fail(switchback.Errorf(switchback.CodeNoSpace, "the storage has %d MiB left, %d MiB are kept in reserve: it takes no points", free>>20, a.cfg.StorageReserveBytes>>20).
			WithHint("make room there, or let replicas keep less"))
	}
	f, err := os.CreateTemp(a.cfg.StorageDir, ".connectivity-*")
	if err != nil {
		return fail(err)
	}
	err = func() error {
		block := make([]byte, 256<<10)
		_, _ = rand.Read(block) // never fails
		began := time.Now()
		if _, err := f.Write(block[:4096]); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		r.Latency = time.Since(began)
		began = time.Now()
		for r.SentBytes < storageTest && (r.SentBytes == 0 || time.Since(began) < limit) {
			n, err := f.Write(block)
			r.SentBytes += int64(n)
			if err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil {
			return err
		}
		r.BytesPerSecond = float64(r.SentBytes) / time.Since(began).Seconds()
		return nil
	}()
	if err := errors.Join(err, f.Close(), os.Remove(f.Name())); err != nil {
		return fail(err)
	}
	return r
}
