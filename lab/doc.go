// Package lab makes two sites on one machine, each with its own libvirtd, network
// and mount namespaces, with guests, a server and an agent at each site. It is
// the demo, the test bed, and how a new user learns Switchback.
//
//	machine:   server (127.0.0.1), command line
//	primary:   libvirtd, agent, guests ──WAN── recovery: libvirtd, agent
//
// All processes outlive the one that started them; Down ends them. What is
// needed to find them again stands in DIR/lab.json.
package lab
