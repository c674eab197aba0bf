package network_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/lab/network"
	"github.com/switchback-dr/switchback/transport"
)

var (
	wanBytes = flag.Int64("wan.bytes", 4<<20, "bytes of each transfer over the delayed link")
	wanDelay = flag.Duration("wan.delay", 50*time.Millisecond, "delay of a packet, one way")
	wanLoss  = flag.Float64("wan.loss", 0.01, "share of packets lost")
	wanCC    = flag.String("wan.congestion", "", "congestion control that the namespaces begin with, cubic for instance; the machine's if empty")
	wanPort  = "7443"
)

// TestDelayed measures what the product's connections carry over a WAN: dialled
// directly and called over a line, one stream and six, and the time of a call.
// No figure is asserted; that the bytes arrive is.
func TestDelayed(t *testing.T) {
	if role := os.Getenv("SWITCHBACK_WAN_PART"); role != "" {
		t.Skip("a part of another test")
	}
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip(err)
	}
	var names [2]string
	for i := range names {
		names[i] = fmt.Sprintf("sbw%d%d", os.Getpid(), i)
		if out, err := exec.Command("ip", "netns", "add", names[i]).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		t.Cleanup(func() { exec.Command("ip", "netns", "del", names[i]).Run() })
	}
	addresses := [2]netip.Addr{netip.MustParseAddr("10.215.0.1"), netip.MustParseAddr("10.215.0.2")}
	if *wanCC != "" {
		for _, n := range names {
			if out, err := exec.Command("ip", "netns", "exec", n, "sysctl", "-w", "net.ipv4.tcp_congestion_control="+*wanCC).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	l, err := network.ConnectDelayed(t.Context(), names, addresses, network.Delay{OneWay: *wanDelay, Loss: *wanLoss, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	// Two agents: near listens, far dials near; far listens, too, to be dialled.
	dir := t.TempDir()
	ca, err := transport.NewCA("sb-wan")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"near", "far"} {
		c, err := ca.Issue(transport.Identity{Installation: "sb-wan", Role: transport.RoleAgent, Site: "s", ID: id}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := transport.SaveCredentials(filepath.Join(dir, id), c); err != nil {
			t.Fatal(err)
		}
	}
	part := func(ctx context.Context, role, namespace string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "ip", "netns", "exec", namespace, os.Args[0], "-test.run", "^TestDelayedPart$", "-test.v",
			"-wan.bytes", fmt.Sprint(*wanBytes))
		cmd.Env = append(os.Environ(), "SWITCHBACK_WAN_PART="+role, "SWITCHBACK_WAN_DIR="+dir,
			"SWITCHBACK_WAN_NEAR="+addresses[0].String(), "SWITCHBACK_WAN_FAR="+addresses[1].String())
		return cmd
	}
	ctx, cancel := context.WithCancel(t.Context())
	far := part(ctx, "far", names[1])
	if err := far.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = far.Wait() }()
	out, err := part(ctx, "near", names[0]).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("delay %v each way, loss %.1f %%:\n%s", *wanDelay, *wanLoss*100, out)
}

// TestDelayedPart is one side of TestDelayed, in a process and a namespace of its own.
func TestDelayedPart(t *testing.T) {
	role, dir := os.Getenv("SWITCHBACK_WAN_PART"), os.Getenv("SWITCHBACK_WAN_DIR")
	if role == "" {
		t.Skip("a part of TestDelayed")
	}
	creds, err := transport.LoadCredentials(filepath.Join(dir, role))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	inbound := transport.NewInbound(creds, nil)
	mux := http.NewServeMux()
	mux.Handle("POST "+transport.DialInPath, inbound)
	mux.HandleFunc("POST /v1/sink", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, n)
	})
	srv := transport.NewHTTPServer(creds, mux, log)
	ln, err := transport.Listen(t.Context(), "0.0.0.0:"+wanPort)
	if err != nil {
		t.Fatal(err)
	}
	go srv.ServeTLS(ln, "", "")
	near, far := os.Getenv("SWITCHBACK_WAN_NEAR")+":"+wanPort, os.Getenv("SWITCHBACK_WAN_FAR")+":"+wanPort
	if role == "far" {
		transport.NewOutbound(transport.OutboundConfig{Credentials: creds, Peer: near, Want: transport.Agent("near"), Handler: mux, Logger: log}).Run(t.Context())
		return
	}
	defer srv.Close()
	ways := []struct{ name, address string }{{"dialled", far}, {"over a line", transport.AgentName("far")}}
	data := make([]byte, 1<<20)
	rand.Read(data)
	for _, way := range ways {
		client := transport.NewHTTPClient(transport.ClientConfig{Credentials: creds, Want: transport.Agent("far"), Inbound: inbound})
		send := func(n int64) (time.Duration, error) {
			began := time.Now()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+way.address+"/v1/sink", io.LimitReader(repeat{data}, n))
			if err != nil {
				return 0, err
			}
			resp, err := transport.Do(client, req)
			if err != nil {
				return 0, err
			}
			defer resp.Body.Close()
			var got int64
			if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
				return 0, err
			}
			if got != n {
				err = fmt.Errorf("%d of %d bytes arrived", got, n)
			}
			return time.Since(began), err
		}
		var first time.Duration
		for deadline := time.Now().Add(30 * time.Second); ; {
			if first, err = send(1); err == nil || time.Now().After(deadline) {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		var again time.Duration
		for range 5 {
			d, err := send(1)
			if err != nil {
				t.Fatal(err)
			}
			if again == 0 || d < again {
				again = d
			}
		}
		one, err := send(*wanBytes)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var wg sync.WaitGroup
		errs := make([]error, 6)
		for i := range errs {
			wg.Go(func() { _, errs[i] = send(*wanBytes) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		six := time.Since(began)
		rate := func(n int64, d time.Duration) float64 { return float64(n) / d.Seconds() / 1e6 }
		fmt.Printf("%-12s first call %v, next %v; one stream %.1f MB/s, six %.1f MB/s\n", way.name,
			first.Round(time.Millisecond), again.Round(time.Millisecond), rate(*wanBytes, one), rate(6**wanBytes, six))
	}
}

// repeat reads the same bytes again and again.
type repeat struct{ data []byte }

func (r repeat) Read(p []byte) (int, error) { return copy(p, r.data), nil }
