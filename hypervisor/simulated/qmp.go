package simulated

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// monitor is a connection to a machine's QMP socket. One command at a time.
type monitor struct {
	conn net.Conn
	mu   sync.Mutex // held over a command
	// answers carries what is no event; closed when the connection is lost.
	answers chan answer
	greeted chan struct{}
	gone    chan struct{}
}

type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	QMP   any    `json:"QMP"`
}

// commandTime bounds one QMP command; they are quick unless the machine is stuck.
const commandTime = 30 * time.Second

var errGone = switchback.Errorf(switchback.CodeUnavailable, "the machine's process is gone")

func dialMonitor(socket string) (*monitor, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, answers: make(chan answer, 1), greeted: make(chan struct{}), gone: make(chan struct{})}
	go m.receive()
	// What is sent before the greeting may be read by two of QEMU's threads at
	// once, each a part of it, while the monitor moves to its own (see launch).
	select {
	case <-m.greeted:
	case <-m.gone:
		conn.Close()
		return nil, errGone
	case <-time.After(commandTime):
		conn.Close()
		return nil, switchback.Errorf(switchback.CodeTimeout, "the machine's process does not answer")
	}
	if err := m.do("qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) receive() {
	defer close(m.gone)
	defer close(m.answers)
	greet := sync.OnceFunc(func() { close(m.greeted) })
	d := json.NewDecoder(bufio.NewReader(m.conn))
	for {
		var a answer
		if err := d.Decode(&a); err != nil {
			return
		}
		switch {
		case a.QMP != nil:
			greet()
		case a.Event == "":
			m.answers <- a
		}
	}
}

// args are the arguments of a command.
type args map[string]any

// qmpError is what a machine refused.
type qmpError struct{ command, desc string }

func (e *qmpError) Error() string { return e.command + ": " + e.desc }

func (m *monitor) do(command string, a args, out any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	msg := map[string]any{"execute": command}
	if a != nil {
		msg["arguments"] = a
	}
	b, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if err := m.conn.SetDeadline(time.Now().Add(commandTime)); err != nil {
		return errGone
	}
	if _, err := m.conn.Write(b); err != nil {
		return errGone
	}
	got, open := <-m.answers
	if !open {
		return errGone
	}
	if err := m.conn.SetDeadline(time.Time{}); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	if got.Error != nil {
		return &qmpError{command, got.Error.Desc}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(got.Return, out); err != nil {
		return fmt.Errorf("answer of %s: %w", command, err)
	}
	return nil
}

// transaction does all actions at one instant, or none.
func (m *monitor) transaction(actions []action) error {
	if len(actions) == 0 {
		return nil
	}
	return m.do("transaction", args{"actions": actions}, nil)
}

type action struct {
	Type string `json:"type"`
	Data args   `json:"data"`
}
