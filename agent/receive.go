package agent

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qemu"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/transport"
)

// routePeers serves what a source agent may ask of the replicas kept here.
func (a *Agent) routePeers(mux *http.ServeMux) {
	route := func(pattern string, f func(r *http.Request, v *vm) (any, error)) {
		mux.Handle(pattern, transport.RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			v, err := a.peersVM(r)
			var answer any
			if err == nil {
				answer, err = f(r, v)
			}
			if err != nil {
				transport.WriteError(w, err)
				return
			}
			transport.WriteJSON(w, http.StatusOK, answer)
		}), transport.RoleAgent))
	}
	a.routeOwnership(mux)
	route("GET /v1/replicas/{protection}", func(r *http.Request, v *vm) (any, error) { return v.targetState() })
	route("POST /v1/replicas/{protection}/points", func(r *http.Request, v *vm) (any, error) { return v.receive(r) })
	route("POST /v1/replicas/{protection}/definition", func(r *http.Request, v *vm) (any, error) { return struct{}{}, v.receiveDefinition(r) })
	route("POST /v1/replicas/{protection}/seed/{session}", func(r *http.Request, v *vm) (any, error) { return struct{}{}, v.receiveSeed(r) })
	route("POST /v1/replicas/{protection}/seed/{session}/flush", func(r *http.Request, v *vm) (any, error) { return struct{}{}, v.flushSeed(r) })
	route("POST /v1/replicas/{protection}/seed/{session}/finish", func(r *http.Request, v *vm) (any, error) { return struct{}{}, v.finishSeed(r) })
}

// peersVM finds the VM and checks that the caller is its peer.
func (a *Agent) peersVM(r *http.Request) (*vm, error) {
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	v, err := a.vm(switchback.ProtectionID(r.PathValue("protection")))
	if err != nil {
		return nil, err
	}
	if peer := v.assignment().Peer; string(peer.Agent) != id.ID || peer.Site != id.Site {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "agent %s of site %s is not the peer of %s here, %s of %s is", id.ID, id.Site, v.assignment().Protection, peer.Agent, peer.Site)
	}
	return v, nil
}

// targetRole checks that points are taken here at all, and the sender's epoch.
func (v *vm) targetRole(r *http.Request) (switchback.Epoch, error) {
	text := r.Header.Get(epochHeader)
	if text == "" {
		text = r.URL.Query().Get("epoch")
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, switchback.Errorf(switchback.CodeInvalid, "message without an epoch")
	}
	return switchback.Epoch(n), v.standing().AcceptsPoint(switchback.Epoch(n))
}

func (v *vm) targetState() (replicator.TargetState, error) {
	a := v.assignment()
	s := replicator.TargetState{Epoch: a.Epoch, Session: a.Session}
	if a.Role != agentapi.RoleTarget {
		return s, nil // the newer epoch tells the source
	}
	r, err := v.openReplica()
	if err != nil {
		return s, err
	}
	s.Seeded, s.Head = !r.Manifest().Seeding, r.Head()
	if s.Head.Sequence == 0 {
		s.Head.Checkpoint = a.BaseCheckpoint
	}
	s.FreeBytes, _ = freeBytes(a.Dir)
	return s, nil
}

func (v *vm) receive(r *http.Request) (switchback.Point, error) {
	epoch, err := v.targetRole(r)
	if err != nil {
		return switchback.Point{}, err
	}
	replica, err := v.openReplica()
	if err != nil {
		return switchback.Point{}, err
	}
	p, err := replica.Receive(r.Context(), epoch, r.Body)
	if err != nil {
		return p, err
	}
	if epoch > v.assignment().Epoch { // a switch was undone while this agent was away
		if err := replica.SetRetentionFrozen(false); err != nil {
			return p, err
		}
		if err := v.change(func(x *Assignment) { x.become(agentapi.RoleTarget, max(x.Epoch, epoch)) }); err != nil {
			return p, err
		}
	}
	v.judge(replica, p)
	v.retainLater()
	return p, nil
}

// base is an open writer of one base image: our NBD client at a qemu-nbd.
type base struct {
	client *nbd.Client
	server *qemu.NBDServer
}

func (b *base) WriteAt(p []byte, off int64) (int, error) { return b.client.WriteAt(p, off) }
func (b *base) WriteZeroes(off, n int64) error {
	return b.client.WriteZeroes(context.Background(), off, n, true)
}
func (b *base) Flush() error { return b.client.Flush(context.Background()) }

func (b *base) close() error {
	return errors.Join(b.client.Close(), b.server.Stop(context.Background()))
}

// openBase starts a writer of a base image. Only QEMU's tools write images.
func (v *vm) openBase(ctx context.Context, disk, path string) (*base, error) {
	socket := filepath.Join(v.agent.cfg.RunDir, string(v.assignment().Protection)+"."+disk+".base")
	os.Remove(socket)
	s, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: path, Format: "qcow2", Socket: socket, Export: disk, Cache: "writeback", Discard: true})
	if err != nil {
		return nil, err
	}
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: disk})
	if err != nil {
		return nil, errors.Join(err, s.Stop(context.Background()))
	}
	return &base{c, s}, nil
}

// openBases opens all base writers for seeding and keeps them open.
func (v *vm) openBases() (map[string]journal.BaseWriter, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bases == nil {
		v.bases = map[string]*base{}
	}
	out := map[string]journal.BaseWriter{}
	for _, d := range v.a.Disks {
		b := v.bases[d.Name]
		if b == nil {
			v.mu.Unlock()
			nb, err := v.openBase(context.Background(), d.Name, d.Path)
			v.mu.Lock()
			if err != nil {
				return nil, err
			}
			if v.bases[d.Name] == nil {
				v.bases[d.Name] = nb
			}
			b = v.bases[d.Name]
		}
		out[d.Name] = b
	}
	return out, nil
}

func (v *vm) closeBases() error {
	v.mu.Lock()
	bases := v.bases
	v.bases = nil
	v.mu.Unlock()
	var errs []error
	for _, b := range bases {
		errs = append(errs, b.close())
	}
	return errors.Join(errs...)
}

func (v *vm) seedSession(r *http.Request) (*journal.Replica, error) {
	if _, err := v.targetRole(r); err != nil {
		return nil, err
	}
	if s := v.assignment().Session; r.PathValue("session") != s {
		return nil, switchback.Errorf(switchback.CodeConflict, "seeding session %s is over, the base is of %s", r.PathValue("session"), s)
	}
	return v.openReplica()
}

func (v *vm) receiveSeed(r *http.Request) error {
	replica, err := v.seedSession(r)
	if err != nil {
		return err
	}
	if free, _ := freeBytes(v.assignment().Dir); free < v.agent.cfg.StorageReserveBytes {
		return switchback.Errorf(switchback.CodeNoSpace, "the target's storage %s has %d MiB left, %d MiB are kept in reserve",
			v.assignment().Dir, free>>20, v.agent.cfg.StorageReserveBytes>>20)
	}
	v.seeding.Lock() // one opener of the bases
	bases, err := v.openBases()
	v.seeding.Unlock()
	if err != nil {
		return err
	}
	if err := replica.ApplySeed(r.Context(), r.Body, bases); err != nil {
		return err
	}
	return nil
}

func (v *vm) flushSeed(r *http.Request) error {
	replica, err := v.seedSession(r)
	if err != nil {
		return err
	}
	bases, err := v.openBases()
	if err != nil {
		return err
	}
	for name, b := range bases {
		if err := b.Flush(); err != nil {
			return switchback.Errorf(switchback.CodeOf(err), "flush base %s: %w", name, err)
		}
	}
	return replica.SyncSums()
}

func (v *vm) finishSeed(r *http.Request) error {
	replica, err := v.seedSession(r)
	if err != nil {
		return err
	}
	var p switchback.Point
	if err := transport.ReadJSON(r, &p); err != nil {
		return err
	}
	if !replica.Manifest().Seeding {
		return nil
	}
	if err := v.flushSeed(r); err != nil {
		return err
	}
	if err := v.closeBases(); err != nil {
		return err
	}
	return replica.FinishSeed(p)
}
