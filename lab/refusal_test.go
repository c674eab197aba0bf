package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/lab/process"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
	"github.com/switchback-dr/switchback/witness"
)

// TestRefusedVMs asks for protections that cannot be, of VMs that are only defined.
func TestRefusedVMs(t *testing.T) {
	ctx, c := t.Context(), shared.client
	protect := func(vm string, to switchback.SiteID) error {
		_, err := c.Request(ctx, vm, recovery.Protect, api.OperationRequest{To: to})
		return err
	}
	checkRefusal(t, protect("nobody", Recovery), switchback.CodeNotFound, `no VM "nobody"`)

	images := shared.Site(Primary).HostPath("/var/lib/libvirt/images")
	for _, format := range []string{"raw", "qcow2"} {
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", format, filepath.Join(images, "refused."+format), "64M").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for name, tt := range map[string]struct{ disk, reason string }{
		"raw":       {`<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/var/lib/libvirt/images/refused.raw'/><target dev='vda' bus='virtio'/></disk>`, "raw has no persistent bitmaps"},
		"shared":    {`<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/var/lib/libvirt/images/refused.raw'/><target dev='vda' bus='virtio'/><shareable/></disk>`, "shareable"},
		"lun":       {`<controller type='scsi' model='virtio-scsi'/><disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/null'/><target dev='sda' bus='scsi'/></disk>`, "SCSI passthrough"},
		"one-of-2":  {`<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/libvirt/images/refused.qcow2'/><target dev='vda' bus='virtio'/></disk><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/var/lib/libvirt/images/refused.raw'/><target dev='vdb' bus='virtio'/></disk>`, "disk vdb: raw"},
		"diskless":  {``, "no disk that can be protected"},
		"shut-down": {`<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/libvirt/images/refused.qcow2'/><target dev='vda' bus='virtio'/></disk>`, "is off"},
	} {
		t.Run(name, func(t *testing.T) {
			vm := fmt.Sprintf("refused-%s-%d", name, os.Getpid())
			file := filepath.Join(t.TempDir(), "vm.xml")
			xml := fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
				<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>%s</devices></domain>`, vm, tt.disk)
			if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := shared.Virsh(ctx, Primary, "define", file); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { shared.Virsh(context.Background(), Primary, "undefine", vm) })
			code := switchback.CodeUnsupported
			if name == "shut-down" {
				code = switchback.CodeRefused
			}
			checkRefusal(t, protect(vm, Recovery), code, tt.reason)
		})
	}
	if vms, err := c.VMs(ctx); err != nil || len(vms) > 0 {
		t.Errorf("refusals left %v, %v", vms, err)
	}
}

// TestRefusedPeers shows tokens and certificates that are not good.
func TestRefusedPeers(t *testing.T) {
	ctx, c := t.Context(), shared.client
	const third = "third"
	if err := c.CreateSite(ctx, third); err != nil {
		t.Fatal(err)
	}
	mint := func(c *api.Client, validFor time.Duration) string {
		t.Helper()
		token, err := c.MintToken(ctx, third, validFor)
		if err != nil {
			t.Fatal(err)
		}
		return token.Token
	}
	join := func(token string) (state string, err error) {
		state = t.TempDir()
		out, err := exec.CommandContext(ctx, shared.cfg.Executable, "agent", "join", "--state", state, "--address", "127.0.0.1:1", token).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		if _, lerr := transport.LoadCredentials(filepath.Join(state, "identity")); (lerr == nil) != (err == nil) {
			t.Errorf("join: %v; credentials: %v", err, lerr)
		}
		return state, err
	}
	refused := func(token, text string) {
		t.Helper()
		if _, err := join(token); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("join: %v; expected a refusal with %q", err, text)
		}
	}
	short, good := mint(c, time.Second), mint(c, time.Minute)
	if _, err := join(good); err != nil {
		t.Fatal(err)
	}
	refused(good, "used")
	refused("nonsense", "token")
	flip := []byte(mint(c, time.Minute))
	if i := len(flip) - 4; flip[i] == 'A' {
		flip[i] = 'B'
	} else {
		flip[i] = 'A'
	}
	refused(string(flip), "token")
	time.Sleep(time.Second)
	refused(short, "expired")

	// The agent of the third site has joined and never runs.
	agents, err := c.Agents(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range agents {
		if a.Site == third && a.Healthy {
			t.Errorf("an agent that never ran is healthy: %+v", a)
		}
	}

	// Another installation: neither its administrator nor its agents are believed here.
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	other, err := process.Start(exec.Command(shared.cfg.Executable, "server", "--state", dir, "--listen", fmt.Sprintf("127.0.0.1:%d", port)), filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Kill(9)
	var oc *api.Client
	for range 200 {
		if oc, err = api.Dial(filepath.Join(dir, "admin")); err == nil {
			if _, err = oc.Sites(ctx); err == nil {
				break
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := oc.CreateSite(ctx, third); err != nil {
		t.Fatal(err)
	}
	foreign, err := join(mint(oc, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for name, address := range map[string]string{"server": fmt.Sprintf("127.0.0.1:%d", shared.state.Port), "agent": shared.AgentAddress(Recovery)} {
		for _, from := range []string{filepath.Join(foreign, "identity"), filepath.Join(dir, "admin")} {
			if status, body, err := insecure(ctx, from, "https://"+address+"/v1/sites"); err == nil && status < 400 {
				t.Errorf("the %s answers a certificate of another installation: %d %s", name, status, body)
			} else {
				t.Logf("%s: %d %s %v", name, status, body, err)
			}
		}
	}
}

// insecure calls with the credentials in dir, whoever the other side is.
func insecure(ctx context.Context, dir, url string) (int, string, error) {
	pem, err := os.ReadFile(filepath.Join(dir, "identity.pem"))
	if err != nil {
		return 0, "", err
	}
	pair, err := tls.X509KeyPair(pem, pem)
	if err != nil {
		return 0, "", err
	}
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// staleEpochs sends, with real credentials, a task and a point under an epoch
// that is over.
func (f *fixture) staleEpochs() {
	f.t.Helper()
	ctx, v := f.t.Context(), f.vm()
	if v.Epoch < 2 {
		f.t.Fatalf("epoch %d is the first", v.Epoch)
	}
	server, err := transport.LoadCredentials(filepath.Join(f.cfg.Dir, "server", "server"))
	f.must(err)
	for _, site := range []string{Primary, Recovery} {
		a := agentapi.Client{HTTP: transport.NewHTTPClient(transport.ClientConfig{Credentials: server}), Address: f.AgentAddress(site)}
		for _, action := range []string{agentapi.ActionHold, agentapi.ActionActivate, agentapi.ActionReinstate, agentapi.ActionFence, agentapi.ActionRelease} {
			err := a.Run(ctx, agentapi.Task{Key: "stale/" + action, Action: action, Protection: v.ID, Epoch: v.Epoch - 1}, nil, nil, nil)
			checkRefusal(f.t, err, switchback.CodeStaleEpoch, fmt.Sprintf("epoch %d", v.Epoch-1))
		}
	}
	agent, err := transport.LoadCredentials(f.Site(string(v.Source)).HostPath("/var/lib/switchback/identity"))
	f.must(err)
	hc := transport.NewHTTPClient(transport.ClientConfig{Credentials: agent})
	url := "https://" + f.AgentAddress(string(v.Target)) + "/v1/replicas/" + string(v.ID)
	for _, path := range []string{"/points", "/seed/x", "/seed/x/flush", "/seed/x/finish"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+path, bytes.NewReader([]byte("SWITCHBACK")))
		f.must(err)
		req.Header.Set("Switchback-Epoch", fmt.Sprint(v.Epoch-1))
		resp, err := transport.Do(hc, req)
		if err == nil {
			resp.Body.Close()
		}
		checkRefusal(f.t, err, switchback.CodeStaleEpoch, "epoch")
	}
}

// TestDamageAndUnprotect damages copies of a replica, and then ends the
// protection, with and without its data.
func TestDamageAndUnprotect(t *testing.T) {
	t.Parallel()
	f := addGuest(t, Guest{Name: "un", ContentBytes: 8 << 20})
	f.refused(recovery.Protect, api.OperationRequest{To: Primary}, switchback.CodeInvalid, "another site")
	f.refused(recovery.Protect, api.OperationRequest{To: "nowhere"}, switchback.CodeNotFound, "nowhere")
	const empty = "empty"
	f.must(f.client.CreateSite(t.Context(), empty))
	f.refused(recovery.Protect, api.OperationRequest{To: empty}, switchback.CodeUnavailable, "no healthy agent")
	f.protect()
	f.refused(recovery.Protect, api.OperationRequest{To: Recovery}, switchback.CodeConflict, "protected already")
	f.refused(recovery.Commit, api.OperationRequest{}, switchback.CodeRefused, "fail over first")
	f.morePoints(1)
	f.dirty(Primary, "vda", 3<<20)
	f.morePoints(2)

	t.Run("DamagedSegment", func(t *testing.T) {
		g := *f
		g.t = t
		g.operate(recovery.Pause, api.OperationRequest{})
		defer g.operate(recovery.Resume, api.OperationRequest{})
		newest, replica := g.newest(), g.vm().AtTarget.Replica.Dir
		var want []string
		g.export(Recovery, replica, newest, func(uris []string) { want = g.shas(uris...) })
		host := g.Site(Recovery).HostPath(replica)
		biggest, size := "", int64(0)
		var seq switchback.Sequence
		for s := switchback.Sequence(2); s <= newest; s++ {
			files, _ := filepath.Glob(filepath.Join(host, "*", fmt.Sprintf("%016d*", s)))
			for _, file := range files {
				if st, err := os.Stat(file); err == nil && st.Size() > size {
					biggest, size, seq = file, st.Size(), s
				}
			}
		}
		if size < 1<<20 {
			t.Fatalf("no segment holds the change: %s, %d bytes", biggest, size)
		}
		rel, err := filepath.Rel(host, biggest)
		g.must(err)
		for _, kind := range []string{"flipped", "flipped", "flipped", "flipped", "cut", "cut to nothing", "missing"} {
			damaged := replica + "-damaged"
			if out, err := exec.Command("cp", "-a", host, host+"-damaged").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			file := filepath.Join(host+"-damaged", rel)
			at := randomUpTo(size)
			switch kind {
			case "flipped":
				b, err := os.ReadFile(file)
				g.must(err)
				b[at] ^= 1 << randomUpTo(8)
				g.must(os.WriteFile(file, b, 0o600))
			case "cut":
				g.must(os.Truncate(file, at))
			case "cut to nothing":
				g.must(os.Truncate(file, 0))
			case "missing":
				g.must(os.Remove(file))
			}
			named := ""
			if r, err := journal.Open(host + "-damaged"); err != nil {
				named = err.Error()
			} else {
				damage, err := r.Verify(t.Context(), nil)
				g.must(err)
				for _, d := range damage {
					named += d.Error() + "; "
				}
				g.must(r.Close())
			}
			if kind == "missing" && named != "" {
				named = filepath.Base(file) // the one after it is named: it continues nothing
			}
			if !strings.Contains(named, filepath.Base(file)) && !strings.Contains(named, fmt.Sprintf("segment %d", seq)) && !strings.Contains(named, fmt.Sprintf("point %d", seq)) {
				t.Errorf("%s at %d of segment %d: verify says %q", kind, at, seq, named)
			}
			if got, err := g.tryExport(damaged, newest); err == nil {
				t.Errorf("%s at %d of segment %d: the export serves %v, right is %v", kind, at, seq, got, want)
			}
			g.must(os.RemoveAll(host + "-damaged"))
		}
	})

	for _, removeData := range []bool{false, true} {
		t.Run(fmt.Sprintf("UnprotectRemoveData=%v", removeData), func(t *testing.T) {
			g := *f
			g.t = t
			if removeData {
				g.protect()
				g.morePoints(1)
			}
			v := g.vm()
			dir := filepath.Dir(g.Site(Recovery).HostPath(v.AtTarget.Replica.Dir))
			pid := g.qemu()
			sum := g.operate(recovery.Unprotect, api.OperationRequest{RemoveData: removeData})
			t.Logf("removed %v, left %v", sum.Removed, sum.Left)
			if _, err := g.client.VM(t.Context(), g.Name); switchback.CodeOf(err) != switchback.CodeNotFound {
				t.Errorf("the VM is still protected: %v", err)
			}
			_, err := os.Stat(dir)
			inside := filepath.Dir(v.AtTarget.Replica.Dir)
			if removeData && (!os.IsNotExist(err) || !strings.Contains(strings.Join(sum.Removed, " "), inside)) {
				t.Errorf("%s: %v; said to be removed: %v", dir, err, sum.Removed)
			}
			if !removeData && (err != nil || !strings.Contains(strings.Join(sum.Left, " "), inside)) {
				t.Errorf("%s: %v; said to be left: %v", dir, err, sum.Left)
			}
			if c := g.checkpoints(Primary); len(c) > 0 {
				t.Errorf("checkpoints are left: %v", c)
			}
			if _, err := g.Virsh(t.Context(), Primary, "backup-dumpxml", g.Name); err == nil {
				t.Error("a backup job is left")
			}
			for _, site := range []string{Primary, Recovery} {
				for _, args := range g.commands(site) {
					if text := strings.Join(args, " "); strings.Contains(text, string(v.ID)) && !strings.Contains(text, "qemu-system") {
						t.Errorf("a process is left at %s: %s", site, text)
					}
				}
				state := g.Site(site).HostPath("/var/lib/switchback")
				filepath.Walk(state, func(path string, _ os.FileInfo, _ error) error {
					if strings.Contains(filepath.Base(path), string(v.ID)) && !strings.HasPrefix(path, dir) || filepath.Base(path) == g.UUID() {
						t.Errorf("left at %s: %s", site, path)
					}
					return nil
				})
			}
			if g.qemu() != pid {
				t.Error("the guest was restarted")
			}
			g.running(Primary)
		})
	}

	// Bitmaps show in the image once QEMU has let go of it.
	c, err := f.Control(t.Context(), Primary, f.Name)
	f.must(err)
	f.must(c.PowerOff(t.Context()))
	c.Close()
	f.eventually(120*time.Second, "the guest is off", func() (bool, string) { s := f.virsh(Primary, "domstate", f.Name); return s == "shut off", s })
	for _, d := range f.disks(Primary) {
		out, err := exec.Command("qemu-img", "info", "--output=json", d).CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("sb-")) {
			t.Errorf("%v: %s", err, out)
		}
	}
	f.nothingLost(Primary, f.disks(Primary)...)
	f.virsh(Primary, "start", f.Name) // by hand, with nothing in its way
}

// tryExport reads a point's disks whole; an error is what damage should bring.
func (f *fixture) tryExport(replica string, point switchback.Sequence) ([]string, error) {
	f.t.Helper()
	socket := "/run/switchback/damaged." + f.Name
	host := f.Site(Recovery).HostPath(socket)
	os.Remove(host)
	cmd := f.Site(Recovery).Command(f.t.Context(), f.cfg.Executable, "export", "--replica", replica, "--point", fmt.Sprint(point), "--socket", socket)
	f.must(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		if _, err := os.Stat(host); err == nil {
			break
		}
		select {
		case err := <-ended:
			return nil, fmt.Errorf("the export ended: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	defer func() { cmd.Process.Kill(); <-ended }()
	var sums []string
	for _, uri := range f.uris(host) {
		h, err := witness.SHA256OfDisk(f.t.Context(), uri, witness.SkipHoles)
		if err != nil {
			return nil, err
		}
		sums = append(sums, h.SHA256)
	}
	return sums, nil
}
