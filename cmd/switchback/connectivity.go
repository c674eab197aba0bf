package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

func (c *cli) siteTestConnectivity() *cobra.Command {
	return &cobra.Command{Use: "test-connectivity [SITE…]", Short: "Measure every leg: server, agents, hypervisors, storage",
		Long: `Measure every leg that touches the sites (default: all): server and agents both ways, agents to each other both
ways on the port that carries the points, agents to hypervisor and storage. On each a few round trips, and data
for at most a second. The exit status is 0 if every leg is well, 5 otherwise.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			var req api.ConnectivityRequest
			for _, a := range args {
				req.Sites = append(req.Sites, switchback.SiteID(a))
			}
			r, err := cl.TestConnectivity(cmd.Context(), req)
			if err != nil {
				return err
			}
			if err := c.show(r, func(w io.Writer) { connectivityText(w, r) }); err != nil {
				return err
			}
			failed := 0
			for _, l := range r.Legs {
				if !l.OK {
					failed++
				}
			}
			if failed > 0 {
				return switchback.Errorf(switchback.CodeUnavailable, "%d of %d legs are not well", failed, len(r.Legs)).WithHint("mend the first one: others may follow from it")
			}
			return nil
		}}
}

func connectivityText(w io.Writer, r api.Connectivity) {
	table(w, "FROM\tTO\tSTATE\tLATENCY\tTHROUGHPUT\tCLOCK\tCERTIFICATE\tVERSION", func(row func(string, ...any)) {
		for _, l := range r.Legs {
			state, latency, rate, clock, expiry := "ok", "-", "-", "-", "-"
			switch {
			case !l.OK:
				state = "FAILED"
			case len(l.Warnings) > 0:
				state = "warning"
			}
			if l.Latency > 0 {
				latency = fmt.Sprintf("%.1f ms", float64(l.Latency)/float64(time.Millisecond))
			}
			if l.BytesPerSecond > 0 {
				rate = bytesText(int64(l.BytesPerSecond)) + "/s"
			}
			if !l.CertificateExpires.IsZero() {
				clock = fmt.Sprintf("%+d ms", l.ClockSkew.Milliseconds())
				expiry = l.CertificateExpires.Local().Format("2006-01-02 15:04")
			}
			version := l.Version
			if version == "" {
				version = "-"
			}
			row("%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s", l.From, l.To, state, latency, rate, clock, expiry, version)
		}
	})
	for _, l := range r.Legs {
		if l.Detail != "" {
			fmt.Fprintf(w, "%s to %s: %s\n", l.From, l.To, l.Detail)
		}
		for _, x := range l.Warnings {
			fmt.Fprintf(w, "%s to %s: warning: %s\n", l.From, l.To, x)
		}
		if l.Error != nil {
			bare := *l.Error
			bare.Hint = ""
			fmt.Fprintf(w, "%s to %s: %v\n  remedy: %s\n", l.From, l.To, bare.Error(), l.Error.Hint)
		}
	}
}
