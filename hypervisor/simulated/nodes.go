package simulated

import (
	"strings"
)

// node is what query-named-block-nodes says of one.
type node struct {
	Name    string   `json:"node-name"`
	Driver  string   `json:"drv"`
	File    string   `json:"file"`
	Image   image    `json:"image"`
	Bitmaps []bitmap `json:"dirty-bitmaps"`
}

type image struct {
	Filename string `json:"filename"`
	Backing  *image `json:"backing-image"`
}

type bitmap struct {
	Name         string `json:"name"`
	Recording    bool   `json:"recording"`
	Persistent   bool   `json:"persistent"`
	Inconsistent bool   `json:"inconsistent"`
}

func (n node) bitmap(name string) (bitmap, bool) {
	for _, b := range n.Bitmaps {
		if b.Name == name {
			return b, true
		}
	}
	return bitmap{}, false
}

func (d *domain) nodes() (map[string]node, error) {
	var list []node
	if err := d.mon.do("query-named-block-nodes", nil, &list); err != nil {
		return nil, err
	}
	m := map[string]node{}
	for _, n := range list {
		m[n.Name] = n
	}
	return m, nil
}

// chains returns for each disk the images below its own, nearest first.
func (d *domain) chains() (map[string][]string, error) {
	nodes, err := d.nodes()
	if err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for disk, name := range d.s.Live.Nodes {
		for b := nodes[name].Image.Backing; b != nil; b = b.Backing {
			out[disk] = append(out[disk], b.Filename)
		}
	}
	return out, nil
}

// findNodes asks where the devices are, after a daemon died that may have been
// pivoting one. A backup's filter above the node says nothing new.
func (d *domain) findNodes() {
	var exports []struct {
		ID   string `json:"id"`
		Node string `json:"node-name"`
	}
	if err := d.mon.do("query-block-exports", nil, &exports); err != nil {
		return // the machine is gone: its watcher will say so
	}
	for _, e := range exports {
		disk, ok := strings.CutPrefix(e.ID, "device-")
		if !ok {
			continue
		}
		if job, ok := d.s.Live.Jobs[disk]; ok && e.Node == job.Node {
			if err := d.pivoted(disk, job); err != nil {
				d.host.log.Error("noting a pivot", "vm", d.uuid, "error", err)
			}
		}
	}
}
