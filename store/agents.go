package store

import (
	"context"
	"encoding/json"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

// Agent is the appliance of a site, as the server knows it.
type Agent struct {
	ID   switchback.AgentID `json:"id"`
	Site switchback.SiteID  `json:"site"`
	// Address is where others reach it, host:port.
	Address            string    `json:"address"`
	Version            string    `json:"version"`
	CertificateSerial  string    `json:"certificate_serial"`
	CertificateExpires time.Time `json:"certificate_expires,omitzero"`
	JoinedAt           time.Time `json:"joined_at"`
	// LastSeen and Status are of its last report; the document is the agent's.
	LastSeen time.Time       `json:"last_seen,omitzero"`
	Status   json.RawMessage `json:"status,omitempty"`
}

type agentRow struct {
	bun.BaseModel      `bun:"table:agents"`
	ID                 string `bun:"id,pk"`
	Site               string `bun:"site"`
	Address            string `bun:"address"`
	Version            string `bun:"version"`
	CertificateSerial  string `bun:"certificate_serial"`
	CertificateExpires int64  `bun:"certificate_expires"`
	JoinedAt           int64  `bun:"joined_at"`
	LastSeen           int64  `bun:"last_seen"`
	Status             string `bun:"status"`
}

func (r agentRow) agent() Agent {
	a := Agent{
		ID: switchback.AgentID(r.ID), Site: switchback.SiteID(r.Site), Address: r.Address, Version: r.Version,
		CertificateSerial: r.CertificateSerial, CertificateExpires: instant(r.CertificateExpires),
		JoinedAt: instant(r.JoinedAt), LastSeen: instant(r.LastSeen),
	}
	if r.Status != "" {
		a.Status = json.RawMessage(r.Status)
	}
	return a
}

// SaveAgent adds an agent or replaces what is known of it, at joining and at
// renewal. An agent never changes its site: CodeConflict. CodeNotFound: no such site.
func (s *Store) SaveAgent(ctx context.Context, a Agent) error {
	row := agentRow{
		ID: string(a.ID), Site: string(a.Site), Address: a.Address, Version: a.Version,
		CertificateSerial: a.CertificateSerial, CertificateExpires: micros(a.CertificateExpires),
		JoinedAt: micros(a.JoinedAt), LastSeen: micros(a.LastSeen), Status: string(a.Status),
	}
	n, err := changed(s.write.NewInsert().Model(&row).On("CONFLICT (id) DO UPDATE").
		Set("address = EXCLUDED.address").Set("version = EXCLUDED.version").
		Set("certificate_serial = EXCLUDED.certificate_serial").Set("certificate_expires = EXCLUDED.certificate_expires").
		Set("last_seen = EXCLUDED.last_seen").Set("status = EXCLUDED.status").
		// One that was known by name only joins now.
		Set("joined_at = CASE WHEN agent_row.joined_at = 0 THEN EXCLUDED.joined_at ELSE agent_row.joined_at END").
		Where("agent_row.site = EXCLUDED.site").Exec(ctx))
	switch {
	case isForeignKey(err):
		return switchback.Errorf(switchback.CodeNotFound, "site %s does not exist", a.Site)
	case err == nil && n == 0:
		return switchback.Errorf(switchback.CodeConflict, "agent %s belongs to another site than %s", a.ID, a.Site)
	}
	return failure("agent "+row.ID, err)
}

// TouchAgent stores an agent's report. CodeNotFound: it is not known (any more).
func (s *Store) TouchAgent(ctx context.Context, id switchback.AgentID, address, version string, seen time.Time, status json.RawMessage) error {
	n, err := changed(s.write.NewUpdate().Model((*agentRow)(nil)).
		Set("address = ?", address).Set("version = ?", version).
		Set("last_seen = ?", micros(seen)).Set("status = ?", string(status)).
		Where("id = ?", string(id)).Exec(ctx))
	if err == nil && n == 0 {
		return switchback.Errorf(switchback.CodeNotFound, "agent %s does not exist", id)
	}
	return failure("agent "+string(id), err)
}

// Agent returns one agent, or CodeNotFound.
func (s *Store) Agent(ctx context.Context, id switchback.AgentID) (Agent, error) {
	row := agentRow{ID: string(id)}
	err := s.read.NewSelect().Model(&row).WherePK().Scan(ctx)
	return row.agent(), failure("agent "+row.ID, err)
}

// Agents returns the agents of a site, or of all sites where site is empty, by ID.
func (s *Store) Agents(ctx context.Context, site switchback.SiteID) ([]Agent, error) {
	var rows []agentRow
	q := s.read.NewSelect().Model(&rows).Order("id")
	if site != "" {
		q.Where("site = ?", string(site))
	}
	if err := q.Scan(ctx); err != nil {
		return nil, failure("list agents", err)
	}
	agents := make([]Agent, 0, len(rows))
	for _, r := range rows {
		agents = append(agents, r.agent())
	}
	return agents, nil
}

// AgentAddresses returns the addresses of all agents.
func (s *Store) AgentAddresses(ctx context.Context) (map[switchback.AgentID]string, error) {
	var rows []agentRow
	if err := s.read.NewSelect().Model(&rows).Column("id", "address").Scan(ctx); err != nil {
		return nil, failure("addresses of agents", err)
	}
	list := make(map[switchback.AgentID]string, len(rows))
	for _, r := range rows {
		list[switchback.AgentID(r.ID)] = r.Address
	}
	return list, nil
}

// DeleteAgent removes an agent. CodeNotFound: there is none.
func (s *Store) DeleteAgent(ctx context.Context, id switchback.AgentID) error {
	n, err := changed(s.write.NewDelete().Model((*agentRow)(nil)).Where("id = ?", string(id)).Exec(ctx))
	if err == nil && n == 0 {
		return switchback.Errorf(switchback.CodeNotFound, "agent %s does not exist", id)
	}
	return failure("delete agent "+string(id), err)
}
