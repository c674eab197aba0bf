package libvirt

import (
	"context"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// queueLimit is how many events a slow reader may fall behind.
const queueLimit = 1024

// Events subscribes to all domains. Events that follow its return are
// delivered. When the connection is lost it is made anew, and EventLost is
// delivered once events flow again. A reader that falls more than 1024 events
// behind loses the oldest and finds EventLost in their place.
func (d *Driver) Events(ctx context.Context) (<-chan hypervisor.Event, error) {
	const op = "libvirt.Events"
	q := &eventQueue{wake: make(chan struct{}, 1)}
	cn, err := d.subscribe(ctx, q)
	if err != nil {
		return nil, wrap(op, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		cn.close()
		return nil, wrap(op, switchback.Errorf(switchback.CodeUnavailable, "the libvirt driver is closed"))
	}
	out := make(chan hypervisor.Event)
	d.subs.Go(func() {
		defer close(out)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(d.stop, cancel)()
		d.deliver(ctx, cn, q, out)
	})
	return out, nil
}

// subscribe makes a connection whose events go to q.
func (d *Driver) subscribe(ctx context.Context, q *eventQueue) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	cn, err := dial(ctx, d.cfg.Socket, d.cfg.URI, d.keepAlive(), func(procedure int32, payload []byte) {
		if e, ok := decodeEvent(procedure, payload); ok {
			q.push(e)
		}
	})
	if err != nil {
		return nil, err
	}
	for _, event := range []int32{eventLifecycle, eventIOErrorReason} {
		// The second word: no domain, that is all of them.
		if _, err := cn.call(ctx, procEventRegisterAny, newArgs().i32(event).u32(0)); err != nil {
			cn.close()
			return nil, err
		}
	}
	return cn, nil
}

// deliver hands events on until ctx ends.
func (d *Driver) deliver(ctx context.Context, cn *conn, q *eventQueue, out chan<- hypervisor.Event) {
	defer func() { cn.close() }()
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.wake:
			for e, ok := q.pop(); ok; e, ok = q.pop() {
				if e.Kind == hypervisor.EventIOError {
					e.Disk = d.diskOf(ctx, e)
				}
				select {
				case out <- e.Event:
				case <-ctx.Done():
					return
				}
			}
		case <-cn.dead:
			d.log.Warn("lost the event connection to libvirt", "cause", cn.failure())
			cn.close()
			made := d.resubscribe(ctx, q)
			if made == nil {
				return
			}
			cn = made
			d.log.Info("event connection to libvirt made anew")
			q.push(event{Event: hypervisor.Event{Kind: hypervisor.EventLost, Time: time.Now(), Detail: "connection lost"}})
		}
	}
}

// resubscribe tries until it has a connection; nil when ctx ended.
func (d *Driver) resubscribe(ctx context.Context, q *eventQueue) *conn {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		if cn, err := d.subscribe(ctx, q); err == nil {
			return cn
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// event is an event before its disk has been found.
type event struct {
	hypervisor.Event
	alias, path string // of the disk, for EventIOError
}

// diskOf finds the target name of the disk that an I/O error names by its
// alias and path; "" when it cannot be found any more. Where a backup job's
// filter node saw the error first, libvirt 9.0 names no disk at all: then it is
// asked which disks the guest is paused for.
func (d *Driver) diskOf(ctx context.Context, e event) string {
	r, err := ref(e.UUID)
	if err != nil {
		return ""
	}
	if e.alias == "" && e.path == "" {
		var disk string
		a := newArgs().domain(r).u32(maxDiskErrors).u32(0)
		err := d.do(ctx, r, procDomainGetDiskErrors, a, func(r *result) {
			if r.count(maxDiskErrors, 8) > 0 {
				disk = r.str()
			}
		})
		if err != nil {
			return ""
		}
		return disk
	}
	text, err := d.xml(ctx, r, 0)
	if err != nil {
		return ""
	}
	_, root, err := readDocument(text)
	if err != nil {
		return ""
	}
	for _, disk := range root.FindElements("devices/disk") {
		alias := disk.SelectElement("alias")
		if (alias != nil && alias.SelectAttrValue("name", "") == e.alias) || (e.path != "" && sourcePath(disk) == e.path) {
			if t := disk.SelectElement("target"); t != nil {
				return t.SelectAttrValue("dev", "")
			}
		}
	}
	return ""
}

// lifecycleKinds translates virDomainEventType; what is missing is not told.
var lifecycleKinds = map[int32]hypervisor.EventKind{
	0: hypervisor.EventDefined,
	1: hypervisor.EventUndefined,
	2: hypervisor.EventStarted,
	3: hypervisor.EventSuspended,
	4: hypervisor.EventResumed,
	5: hypervisor.EventStopped,
	7: hypervisor.EventSuspended, // the guest suspended itself
	8: hypervisor.EventStopped,   // crashed
}

// lifecycleDetails names the details of each event type
// (virDomainEventStartedDetailType and its siblings).
var lifecycleDetails = map[int32][]string{
	0: {"added", "updated", "renamed", "from snapshot"},
	1: {"removed", "renamed"},
	2: {"booted", "migrated", "restored", "from snapshot", "woken up"},
	3: {"paused", "migrated", "io-error", "watchdog", "restored", "from snapshot", "api error", "post-copy", "post-copy failed"},
	4: {"unpaused", "migrated", "from snapshot", "post-copy", "post-copy failed"},
	5: {"shut down", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot"},
	7: {"guest suspended to memory", "guest suspended to disk"},
	8: {"panicked", "crash loaded"},
}

// decodeEvent reads one event message; ok is false for one that is not told.
func decodeEvent(procedure int32, payload []byte) (e event, ok bool) {
	r := &result{b: payload}
	r.i32() // callback id: the connection has one subscription only
	d := r.domain()
	e.UUID, e.Name, e.Time = d.vmUUID(), d.name, time.Now()
	switch procedure {
	case procEventLifecycle:
		kind, detail := r.i32(), r.i32()
		e.Kind, ok = lifecycleKinds[kind]
		if words := lifecycleDetails[kind]; detail >= 0 && int(detail) < len(words) {
			e.Detail = words[detail]
		}
	case procEventIOErrorReason:
		e.Kind, ok = hypervisor.EventIOError, true
		e.path, e.alias = r.str(), r.str()
		r.i32() // action: paused, reported or ignored, by the disk's error policy
		e.Detail = r.str()
	}
	return e, ok && r.err == nil
}

// eventQueue holds events for a reader that is slower than libvirt.
type eventQueue struct {
	wake chan struct{} // holds a token when there may be something to pop

	mu      sync.Mutex
	events  []event
	dropped bool
}

func (q *eventQueue) push(e event) {
	q.mu.Lock()
	if len(q.events) >= queueLimit {
		q.events = q.events[1:]
		q.dropped = true
	}
	q.events = append(q.events, e)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *eventQueue) pop() (event, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.dropped {
		q.dropped = false
		return event{Event: hypervisor.Event{Kind: hypervisor.EventLost, Time: time.Now(), Detail: "reader fell behind"}}, true
	}
	if len(q.events) == 0 {
		return event{}, false
	}
	e := q.events[0]
	q.events = q.events[1:]
	return e, true
}
