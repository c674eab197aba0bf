package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/switchback-dr/switchback/api"
)

// cli is what the commands that talk to the server share.
type cli struct {
	out       io.Writer
	configDir string
	output    string
	// breakGlass is the reason for going on without a second person's approval.
	breakGlass string
}

func (c *cli) client() (*api.Client, error) {
	cl, err := api.Dial(c.configDir)
	if err == nil {
		cl.BreakGlass = c.breakGlass
	}
	return cl, err
}

func (c *cli) json() bool { return c.output == "json" }

// show prints v as JSON, or calls text.
func (c *cli) show(v any, text func(w io.Writer)) error {
	if c.json() {
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	text(c.out)
	return nil
}

// table prints rows with aligned columns.
func table(w io.Writer, header string, rows func(row func(format string, args ...any))) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, header)
	rows(func(format string, args ...any) { fmt.Fprintf(tw, format+"\n", args...) })
	tw.Flush()
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

func seconds(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return seconds(time.Since(t).Round(100*time.Millisecond)) + " ago"
}
