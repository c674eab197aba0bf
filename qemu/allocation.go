package qemu

import (
	"context"
	"encoding/json"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Allocated returns the ranges of a qcow2 image that the image itself holds, as
// data or as explicit zeros: what was ever written to an overlay, in whole
// clusters. What images below it hold does not count; they must be readable.
func Allocated(ctx context.Context, path string) (extent.Set, error) {
	var set extent.Set
	out, err := run(ctx, "map", "--output=json", "-f", "qcow2", imageName(path))
	if err != nil {
		return set, err
	}
	var entries []struct {
		Start   int64 `json:"start"`
		Length  int64 `json:"length"`
		Depth   int   `json:"depth"`
		Present bool  `json:"present"`
	}
	if err := json.Unmarshal(out, &entries); err != nil {
		return set, switchback.Errorf(switchback.CodeInternal, "read qemu-img's answer: %w", err)
	}
	for _, e := range entries {
		if e.Depth == 0 && e.Present {
			set.Add(e.Start, e.Length)
		}
	}
	return set, nil
}
