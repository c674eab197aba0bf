#!/bin/sh
# install-versitygw.sh [DIR] - builds the S3 server that the tests run against into DIR (.tools),
# unless it is there, and prints its path. It is a tool of the tests, no part of the product.
set -eu
version=v1.8.0
dir=${1:-$(dirname "$0")/../.tools}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
bin=$dir/versitygw-$version
if [ ! -x "$bin" ]; then
	# Two tests may want it at once: each builds for itself, the last one stays.
	work=$(mktemp -d "$dir/build-XXXXXX")
	trap 'rm -rf "$work"' EXIT
	GOBIN=$work GOFLAGS=-buildvcs=false CGO_ENABLED=0 go install "github.com/versity/versitygw/cmd/versitygw@$version" >&2
	mv "$work/versitygw" "$bin"
fi
echo "$bin"
