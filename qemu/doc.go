// Package qemu runs qemu-img and qemu-nbd. They are the only writers of qcow2
// images: image locks, refcounts and bitmaps stay in the hands of the code that
// defines them.
//
// All tools run with LC_ALL=C and die with this process. An error is a
// *switchback.Error that carries what the tool printed last:
//
//	CodeNotFound    a file in the chain does not exist
//	CodeConflict    another process holds the image's lock; the hint names it where it can be found
//	CodeNoSpace     the file system is full
//	CodeBitmapLost  a bitmap is missing or inconsistent
//	CodeCorrupt     an image is damaged
//	CodeUnavailable an NBD server does not answer, or the tools are not installed
//	CodeInternal    anything else
//
// An image is named by a path or by what else QEMU takes there, such as
// "nbd+unix:///vda?socket=/run/view.sock". Formats are always passed on rather
// than probed: the content of a raw disk belongs to its guest, which could make
// it look like a qcow2 image that has some file of the host as its backing.
package qemu
