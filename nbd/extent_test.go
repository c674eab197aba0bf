package nbd

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCover(t *testing.T) {
	z := StateZero
	tests := []struct {
		name     string
		in       []Extent
		off, len int64
		want     []Extent
	}{
		{"nothing known is data", nil, 10, 5, []Extent{{10, 5, 0}}},
		{"exact", []Extent{{10, 5, z}}, 10, 5, []Extent{{10, 5, z}}},
		{"clipped at both ends", []Extent{{0, 100, z}}, 10, 5, []Extent{{10, 5, z}}},
		{"gap in the middle", []Extent{{10, 1, z}, {13, 9, z}}, 10, 5, []Extent{{10, 1, z}, {11, 2, 0}, {13, 2, z}}},
		{"gap at the end", []Extent{{10, 1, z}}, 10, 5, []Extent{{10, 1, z}, {11, 4, 0}}},
		{"merged", []Extent{{10, 1, z}, {11, 1, z}, {12, 3, 0}}, 10, 5, []Extent{{10, 2, z}, {12, 3, 0}}},
		{"overlapping keeps the first", []Extent{{10, 3, z}, {11, 4, 0}}, 10, 5, []Extent{{10, 3, z}, {13, 2, 0}}},
		{"outside", []Extent{{0, 10, z}, {15, 9, z}}, 10, 5, []Extent{{10, 5, 0}}},
		{"empty and negative", []Extent{{10, 0, z}, {12, -4, z}}, 10, 5, []Extent{{10, 5, 0}}},
		{"end overflows", []Extent{{1, 1<<63 - 1, z}}, 10, 5, []Extent{{10, 5, z}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, cover(tt.in, tt.off, tt.len)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}
