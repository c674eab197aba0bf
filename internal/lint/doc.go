// Package lint has only tests: they hold the rules of the codebase that a
// compiler does not, so that those cannot rot. It guarantees nothing to
// callers; whoever adds a package gives it its place in layers.
package lint
