package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/switchback-dr/switchback/api"
)

// admitByHand lets an agent join whose request and answer are carried.
func (w *world) admitByHand(site, dir string) error {
	run := func(args ...string) (string, error) {
		if status := w.run(io.Discard, io.Discard, args...); status != 0 {
			return "", fmt.Errorf("%v: status %d: %s", args, status, &w.stderr)
		}
		return w.stdout.String(), nil
	}
	request, err := run("agent", "request", "--state", dir, "--reachable=false")
	if err != nil {
		return err
	}
	text, err := run("-o", "json", "site", "admit", site, request)
	if err != nil {
		return err
	}
	var answer api.AdmitAnswer
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return err
	}
	_, err = run("agent", "join", "--state", dir, answer.Answer)
	return err
}
