package simulated

import (
	"bufio"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strconv"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// PowerKind is what happened to a machine's processor.
type PowerKind string

const (
	// PowerStart: a process was made, paused; nothing has run yet.
	PowerStart PowerKind = "start"
	// PowerRun: the guest runs from here.
	PowerRun PowerKind = "run"
	// PowerPause: it does not run, but may go on.
	PowerPause PowerKind = "pause"
	// PowerOff: its process is gone.
	PowerOff PowerKind = "off"
)

// PowerEvent is one line of the power log. PowerRun is written before the guest
// may run, PowerPause and PowerOff after it cannot any more: so the log never
// shows less overlap than there was.
type PowerEvent struct {
	Time time.Time         `json:"time"`
	Host string            `json:"host"`
	VM   switchback.VMUUID `json:"vm"`
	Kind PowerKind         `json:"kind"`
	// Boot names the start of the machine's process: microseconds since 1970.
	Boot int64 `json:"boot"`
	// Epoch is the one that its overlays are named after; 0 = it runs on plain disks.
	Epoch  int    `json:"epoch,omitempty"`
	Detail string `json:"detail,omitempty"`
}

var overlayEpoch = regexp.MustCompile(`/overlay-(\d+)-`)

func (h *Host) power(d *domain, kind PowerKind, detail string) {
	e := PowerEvent{Time: time.Now(), Host: h.cfg.Name, VM: d.uuid, Kind: kind, Boot: d.s.Boot, Detail: detail}
	if d.s.Live != nil {
		if m := overlayEpoch.FindStringSubmatch(d.s.Live.Definition); m != nil {
			e.Epoch, _ = strconv.Atoi(m[1]) // digits
		}
	}
	b, err := json.Marshal(e)
	if err != nil {
		h.log.Error("power log", "error", err)
		return
	}
	f, err := os.OpenFile(h.cfg.PowerLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		_, err = f.Write(append(b, '\n')) // one write: lines of several hosts do not mix
		f.Close()
	}
	if err != nil {
		h.log.Error("power log", "error", err)
	}
}

// ReadPowerLog reads a power log; one that does not exist yet is empty.
func ReadPowerLog(path string) ([]PowerEvent, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []PowerEvent
	for s := bufio.NewScanner(f); s.Scan(); {
		var e PowerEvent
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

// Overlap is a time in which two hosts ran one machine.
type Overlap struct {
	VM    switchback.VMUUID
	First PowerEvent // ran already
	Then  PowerEvent // began to run, too
}

// Overlaps finds where two copies of a machine ran at once. Events count by
// their time.
func Overlaps(events []PowerEvent) []Overlap {
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b PowerEvent) int { return a.Time.Compare(b.Time) })
	running := map[switchback.VMUUID]map[string]PowerEvent{}
	var found []Overlap
	for _, e := range events {
		on := running[e.VM]
		if on == nil {
			on = map[string]PowerEvent{}
			running[e.VM] = on
		}
		switch e.Kind {
		case PowerRun:
			for host, first := range on {
				if host != e.Host {
					found = append(found, Overlap{e.VM, first, e})
				}
			}
			on[e.Host] = e
		case PowerPause, PowerOff:
			delete(on, e.Host)
		}
	}
	return found
}
