// Package witness finds out, without any package of the product, what became of
// the guests' data: it reads disks at rest through qemu-nbd or any NBD server,
// consoles of guests, byte counters of network interfaces and the lifetimes of
// QEMU processes. What the demo and the end-to-end tests claim rests on it, so it
// has an NBD client, a reader of the guests' record format and parsers of its
// own, and tests that prove that it notices sabotage.
//
// Disks are named by strings: the path of an image (any format qemu-nbd knows,
// with backing files), or an NBD URI (nbd://host:port/export,
// nbd+unix:///export?socket=path). A path is read without taking or
// respecting locks, so it should be at rest.
package witness
