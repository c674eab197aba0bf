package simulated

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
)

// calls are the methods of Host that a Driver may call.
var calls = []string{"Host", "Domains", "Domain", "Definition", "Define", "Undefine", "Start", "Resume", "Suspend", "Shutdown", "Destroy",
	"SetAutostart", "AgentPing", "BeginBackup", "EndBackup", "HasBackup", "CreateCheckpoint", "Checkpoints", "DeleteCheckpoint",
	"BlockCopy", "BlockCommit", "BlockJob", "BlockPivot", "BlockAbort", "Freeze", "Thaw", "GuestWrite", "Kill", "PowerCut"}

// response is the answer to a call: the method's result, or its error.
type response struct {
	Result json.RawMessage   `json:"result,omitempty"`
	Error  *switchback.Error `json:"error,omitempty"`
}

// Serve answers Drivers until ctx ends; machines stay. A second daemon on the
// same directory is refused.
func (h *Host) Serve(ctx context.Context) error {
	lock, err := os.OpenFile(filepath.Join(h.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return switchback.Errorf(switchback.CodeConflict, "another daemon works in %s", h.dir)
	}
	if err := os.Remove(Socket(h.dir)); err != nil && !os.IsNotExist(err) {
		return err
	}
	ln, err := net.Listen("unix", Socket(h.dir))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /call/{method}", h.serveCall)
	mux.HandleFunc("GET /events", h.serveEvents)
	srv := &http.Server{Handler: mux, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return h.Close()
}

// serveCall calls a method. What it began goes on when the caller dies, as
// under libvirtd; only waiting ends.
func (h *Host) serveCall(w http.ResponseWriter, r *http.Request) {
	var params []json.RawMessage
	name := r.PathValue("method")
	method := reflect.ValueOf(h).MethodByName(name)
	var answer response
	err := json.NewDecoder(r.Body).Decode(&params)
	if err == nil && (!slices.Contains(calls, name) || method.Type().NumIn() != len(params)+1) {
		err = switchback.Errorf(switchback.CodeInvalid, "no such call: %s with %d parameters", name, len(params))
	}
	in := []reflect.Value{reflect.ValueOf(r.Context())}
	for i := 0; err == nil && i < len(params); i++ {
		v := reflect.New(method.Type().In(i + 1))
		err = json.Unmarshal(params[i], v.Interface())
		in = append(in, v.Elem())
	}
	if err == nil {
		out := method.Call(in)
		if e, ok := out[len(out)-1].Interface().(error); ok {
			err = e
		} else if len(out) == 2 {
			answer.Result, err = json.Marshal(out[0].Interface())
		}
	}
	if err != nil {
		answer = response{Error: switchback.Flatten(err)}
		if answer.Error.Op == "" {
			answer.Error.Op = "simulated." + name
		}
	}
	_ = json.NewEncoder(w).Encode(answer) // the client is gone, or it is not
}

func (h *Host) serveEvents(w http.ResponseWriter, r *http.Request) {
	events, err := h.Events(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	if out.Flush() != nil {
		return
	}
	for e := range events {
		if json.NewEncoder(w).Encode(e) != nil || out.Flush() != nil {
			return
		}
	}
}

// Dir is the directory in a --hypervisor flag, "simulated:DIR".
func Dir(flag string) (string, bool) { return strings.CutPrefix(flag, "simulated:") }
