package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/replicator"
)

// pointActions are the actions on recovery points. Those that only read take
// no turn with the VM's other actions: a switch must not wait for an export.
func (a *Agent) pointActions() map[string]action {
	return map[string]action{
		agentapi.ActionRotateKey:      onReplica(a, a.rotateKey),
		agentapi.ActionMarkPoint:      onReplica(a, a.markPoint),
		agentapi.ActionDeletePoint:    onVM(a, a.deletePoint, agentapi.RoleTarget),
		agentapi.ActionCheckReplica:   onReplica(a, a.checkReplica),
		agentapi.ActionExportPoint:    onReplica(a, a.exportPoint),
		agentapi.ActionFindDamage:     onReplica(a, a.findDamage),
		agentapi.ActionMend:           onVM(a, a.mend, agentapi.RoleTarget),
		agentapi.ActionKeptDefinition: onReplica(a, a.keptDefinition),

		agentapi.ActionExportSnapshot: onSnapshot(a, func(p agentapi.ExportParams) string { return p.Snapshot }, a.exportSnapshot),
		agentapi.ActionCheckSnapshot:  onSnapshot(a, func(p agentapi.CheckReplicaParams) string { return p.Snapshot }, a.checkSnapshot),

		agentapi.ActionResend:    onVM(a, a.resend, agentapi.RoleSource),
		agentapi.ActionHashRest:  handle(a.hashRest),
		agentapi.ActionHashPoint: onReplica(a, a.hashPoint),
	}
}

// onReplica adapts a typed action on the replica that is kept here, beside
// whatever else is done to the VM.
func onReplica[P any](a *Agent, f func(ctx context.Context, t *task, v *vm, replica *journal.Replica, req agentapi.Task, p P) (any, error)) action {
	return handle(func(ctx context.Context, t *task, req agentapi.Task, p P) (any, error) {
		v, err := a.vm(req.Protection)
		if err != nil {
			return nil, err
		}
		if err := v.roleIs(agentapi.RoleTarget, agentapi.RoleActive); err != nil {
			return nil, err
		}
		replica, err := v.openReplica()
		if err != nil {
			return nil, err
		}
		return f(ctx, t, v, replica, req, p)
	})
}

// routePoints serves what the server asks about single points.
func (a *Agent) routePoints(answer func(pattern string, f func(r *http.Request) (any, error))) {
	answer("GET /v1/points/{protection}/{sequence}", func(r *http.Request) (any, error) {
		v, err := a.vm(switchback.ProtectionID(r.PathValue("protection")))
		if err != nil {
			return nil, err
		}
		seq, err := strconv.ParseUint(r.PathValue("sequence"), 10, 64)
		if err != nil {
			return nil, switchback.Errorf(switchback.CodeInvalid, "%q is no point", r.PathValue("sequence"))
		}
		replica, err := v.openReplica()
		if err != nil {
			return nil, err
		}
		return journal.InspectPoint(replica.Dir(), switchback.Sequence(seq))
	})
}

// rates turns bytes done into progress.
func rates(began time.Time, done, total int64) *replicator.Progress {
	p := &replicator.Progress{DoneBytes: done, TotalBytes: total, Percent: 100}
	if total > 0 {
		p.Percent = 100 * float64(done) / float64(total)
	}
	if took := time.Since(began).Seconds(); took > 0.2 && done > 0 {
		p.RateBytesPerSecond = float64(done) / took
		p.ETA = time.Duration(float64(total-done) / p.RateBytesPerSecond * float64(time.Second))
	}
	return p
}

func (a *Agent) markPoint(_ context.Context, _ *task, v *vm, replica *journal.Replica, _ agentapi.Task, p agentapi.MarkParams) (any, error) {
	err := replica.SetMark(p.Sequence, func(m *switchback.Mark) error {
		if p.Tag != nil {
			m.Tag = *p.Tag
		}
		if p.Locked != nil {
			m.Locked = *p.Locked
		}
		if p.Dismiss {
			m.Suspicious = ""
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, x := range replica.MarkedPoints() {
		if x.Sequence == p.Sequence {
			for _, s := range replica.Samples() {
				if p.Dismiss && s.Digest == x.Digest { // from now on that is usual
					replica.MarkSample(s, false)
				}
			}
			v.agent.log.Info("mark changed", "protection", v.assignment().Protection, "point", p.Sequence, "tag", x.Mark.Tag, "locked", x.Mark.Locked)
			return x, nil
		}
	}
	return nil, switchback.Errorf(switchback.CodeNotFound, "point %d is gone", p.Sequence)
}

// deletePoint deletes the oldest point by folding it into the base. The newest
// one is what the source continues from.
func (a *Agent) deletePoint(ctx context.Context, t *task, v *vm, _ agentapi.Task, p agentapi.DeletePointParams) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	points := replica.MarkedPoints()
	at := -1
	for i, x := range points {
		if x.Sequence == p.Sequence {
			at = i
		}
	}
	if at < 0 {
		if len(points) > 0 && p.Sequence < points[len(points)-1].Sequence {
			return nil, nil // a repeat: it is gone
		}
		return nil, switchback.Errorf(switchback.CodeNotFound, "there is no point %d", p.Sequence)
	}
	if err := mayDelete(points[at], replica.Pins(), v.assignment().Name); err != nil {
		return nil, err
	}
	switch {
	case at == len(points)-1:
		return nil, switchback.Errorf(switchback.CodeRefused, "point %d is the newest: the source continues from it", p.Sequence).
			WithHint("take another point first: switchback vm take-point %s", v.assignment().Name)
	case replica.Manifest().RetentionFrozen:
		return nil, switchback.Errorf(switchback.CodeRefused, "all points are kept while a switch is uncommitted").WithHint("commit or cancel it first")
	}
	if at > 0 || p.Sequence != replica.Manifest().Base.Sequence {
		t.Report("merging the point into the next", nil)
		return nil, replica.Merge(ctx, p.Sequence, points[at+1].Sequence, 0)
	}
	t.Report("folding the oldest point into the base", nil)
	return nil, replica.Fold(ctx, points[1].Sequence, v.openFoldWriter)
}

// mayDelete refuses a point that somebody needs.
func mayDelete(x switchback.MarkedPoint, pins []journal.Pin, vm string) error {
	if x.Mark.Locked {
		return switchback.Errorf(switchback.CodeRefused, "point %d is locked", x.Sequence).
			WithHint("switchback points unlock %s %d", vm, x.Sequence)
	}
	for _, pin := range pins {
		if pin.Sequence == x.Sequence || pin.Damaged {
			what := pin.Info["for"]
			if what == "" {
				what = "pin " + pin.Name
			}
			return switchback.Errorf(switchback.CodeRefused, "point %d is in use: %s", x.Sequence, what).WithHint("end that first")
		}
	}
	return nil
}

const exportPin = "export-"

// exportPinOf is the name of the pin of a task that reads a point.
func exportPinOf(req agentapi.Task) string {
	key := sha256.Sum256([]byte(req.Key))
	return exportPin + hex.EncodeToString(key[:8])
}

// dropExportPins removes the pins of exports that ended with an earlier
// process; one that goes on pins its point again.
func dropExportPins(replica *journal.Replica) error {
	for _, p := range replica.Pins() {
		if strings.HasPrefix(p.Name, exportPin) {
			if err := replica.Unpin(p.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *Agent) exportPoint(ctx context.Context, t *task, v *vm, replica *journal.Replica, req agentapi.Task, p agentapi.ExportParams) (any, error) {
	format, err := export.ParseFormat(p.Format)
	if err != nil {
		return nil, err
	}
	pin := exportPinOf(req)
	if err := replica.Pin(pin, p.Sequence, map[string]string{"for": "an export to " + p.To}); err != nil {
		return nil, err
	}
	began := time.Now()
	result, err := export.Run(ctx, export.Request{Replica: replica.Dir(), Point: p.Sequence, Format: format, To: filepath.Clean(p.To),
		Definition: p.Definition, Rewrite: a.rewriteDisks, ReserveBytes: a.cfg.StorageReserveBytes, SocketDir: a.cfg.RunDir,
		Progress: func(done, total int64) { t.Report("copying", rates(began, done, total)) }})
	if uerr := replica.Unpin(pin); err == nil {
		err = uerr
	}
	if err != nil {
		return nil, err
	}
	v.agent.log.Info("point exported", "protection", v.assignment().Protection, "point", p.Sequence, "to", result.Path, "bytes", result.Bytes)
	return result, nil
}

// rewriteDisks points a definition's disks at stand-alone images.
func (a *Agent) rewriteDisks(definition string, images map[string]string) (string, error) {
	sources := map[string]hypervisor.DiskSource{}
	for name, path := range images {
		sources[name] = hypervisor.DiskSource{Path: path, Format: "qcow2"}
	}
	return a.hv.Translate(definition, hypervisor.Translation{Disks: sources})
}

// findDamage says what the source should send again so that the newest point
// and those that follow are whole. What can be mended here is.
func (a *Agent) findDamage(ctx context.Context, t *task, v *vm, replica *journal.Replica, _ agentapi.Task, p agentapi.FindDamageParams) (any, error) {
	if err := v.roleIs(agentapi.RoleTarget); err != nil {
		return nil, err
	}
	var r agentapi.FindDamageResult
	if done, err := replica.RestoreManifest(); err != nil {
		return nil, err
	} else if done {
		r.Restored = append(r.Restored, "manifest.json, from memory")
	}
	began := time.Now()
	st, err := replica.Check(ctx, journal.CheckOptions{Progress: func(st journal.CheckState) {
		t.Report("looking for damage", rates(began, st.DoneBytes, st.TotalBytes))
	}})
	if err != nil {
		return nil, err
	}
	head := replica.Head().Sequence
	for _, d := range replica.Damaged() {
		st.Damage = append(st.Damage, d)
	}
	r.Ranges = map[string]extent.Set{}
	var unreadable switchback.Sequence
	for _, d := range st.Damage {
		switch {
		case d.Disk != "" && len(d.Ranges) > 0:
			r.Damage = append(r.Damage, d)
			if d.Affects(head) {
				r.Ranges[d.Disk] = r.Ranges[d.Disk].Union(extent.NewSet(d.Ranges...))
			}
		case d.Segment > 0:
			if unreadable == 0 || d.Segment < unreadable {
				unreadable = d.Segment
			}
		case d.To > 0:
			r.Hopeless = append(r.Hopeless, d.Error())
		}
	}
	if unreadable > 0 {
		if !p.DropUnreadable {
			return nil, switchback.Errorf(switchback.CodeRefused, "points from %d on cannot be opened any more: they must go before what they held is sent again", unreadable).
				WithHint("switchback points repair %s --drop-unreadable", v.assignment().Name)
		}
		for _, x := range replica.MarkedPoints() {
			if x.Sequence >= unreadable && x.Mark.Locked {
				return nil, switchback.Errorf(switchback.CodeRefused, "point %d is locked, and is among those that would go", x.Sequence).
					WithHint("switchback points unlock %s %d", v.assignment().Name, x.Sequence)
			}
		}
		t.Report("dropping points that cannot be opened", nil)
		if err := replica.DropAfter(unreadable - 1); err != nil {
			return nil, err
		}
		r.Dropped = append(r.Dropped, "points from "+strconv.FormatUint(uint64(unreadable), 10)+" on")
	}
	return r, nil
}

// mend puts back what the newest point, whole by now, still has of what is damaged.
func (a *Agent) mend(ctx context.Context, t *task, v *vm, _ agentapi.Task, p agentapi.MendParams) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	t.Report("putting back what is damaged", nil)
	r, err := replica.Mend(ctx, p.Damage, v.openFoldWriter)
	if err != nil {
		return nil, err
	}
	if len(r.Mended) > 0 {
		v.agent.log.Info("damage mended", "protection", v.assignment().Protection, "places", len(r.Mended), "bytes", r.Bytes, "left", len(r.Left))
	}
	return r, nil
}

// resend makes the next point carry ranges whether they have changed or not.
func (a *Agent) resend(_ context.Context, _ *task, v *vm, _ agentapi.Task, p agentapi.ResendParams) (any, error) {
	e, err := v.engineFor()
	if err != nil {
		return nil, err
	}
	return nil, e.Resend(p.Ranges)
}
