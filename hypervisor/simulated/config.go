package simulated

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
)

// Config is a simulated host's config.json.
type Config struct {
	// Name of the host; also in the power log.
	Name string `json:"name"`
	UUID string `json:"uuid"`
	// PowerLog is a file that several hosts may share: a line of JSON for each
	// PowerEvent, appended. Empty: DIR/power.log.
	PowerLog string `json:"power_log"`
}

// Create makes a host's directory. The path must be short: sockets are made below.
func Create(dir string, cfg Config) error {
	if len(dir) > 60 {
		return switchback.Errorf(switchback.CodeInvalid, "directory %s is too long for unix sockets", dir).WithHint("at most 60 characters")
	}
	if cfg.UUID == "" {
		cfg.UUID = uuid.NewString()
	}
	if cfg.Name == "" {
		cfg.Name = filepath.Base(dir)
	}
	for _, d := range []string{"domains", "console", "hooks/qemu.d", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	return writeJSON(filepath.Join(dir, "config.json"), cfg)
}

func readConfig(dir string) (Config, error) {
	var cfg Config
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return cfg, switchback.Errorf(switchback.CodeNotFound, "%s holds no simulated hypervisor", dir)
	}
	if err != nil {
		return cfg, err
	}
	if err := json.Unmarshal(b, &cfg); err != nil {
		return cfg, err
	}
	if cfg.PowerLog == "" {
		cfg.PowerLog = filepath.Join(dir, "power.log")
	}
	return cfg, nil
}

// Socket is where the daemon of a host answers.
func Socket(dir string) string { return filepath.Join(dir, "hypervisor.sock") }

// HookPath is where the agent of a host installs its hook.
func HookPath(dir string) string { return filepath.Join(dir, "hooks", "qemu.d", "50-switchback") }

// PIDFile is in the place of libvirtd's, whom an agent tells of a new hook. There
// is none: hooks are looked for at each start.
func PIDFile(dir string) string { return filepath.Join(dir, "libvirtd.pid") }

// ConsolePath is where a guest's program speaks.
func ConsolePath(dir string, vm switchback.VMUUID) string {
	return filepath.Join(dir, "console", string(vm)+".log")
}

// writeJSON replaces a file as a whole; a killed process leaves the old one or the new one.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
