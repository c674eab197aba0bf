package witness

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Traffic is the byte counters of a network interface.
type Traffic struct {
	RxBytes uint64 `json:"rx_bytes"`
	TxBytes uint64 `json:"tx_bytes"`
}

// InterfaceCounters reads the counters of an interface in the network namespace
// of a process, from /proc/PID/net/dev.
func InterfaceCounters(pid int, dev string) (Traffic, error) {
	path := fmt.Sprintf("/proc/%d/net/dev", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return Traffic{}, err
	}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if strings.TrimSpace(name) != dev || len(f) != 16 {
			continue
		}
		var t Traffic
		if t.RxBytes, err = strconv.ParseUint(f[0], 10, 64); err == nil {
			t.TxBytes, err = strconv.ParseUint(f[8], 10, 64)
		}
		return t, err
	}
	return Traffic{}, fmt.Errorf("%s has no interface %s", path, dev)
}

// Sub is the traffic since an earlier reading.
func (t Traffic) Sub(before Traffic) Traffic {
	return Traffic{t.RxBytes - before.RxBytes, t.TxBytes - before.TxBytes}
}
