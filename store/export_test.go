package store

import "testing"

// Pragma returns a setting of the writing connection.
func (s *Store) Pragma(t *testing.T, name string) string {
	t.Helper()
	var v string
	if err := s.write.DB.QueryRow("PRAGMA " + name).Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Exec changes the database behind the store's back.
func (s *Store) Exec(t *testing.T, query string) {
	t.Helper()
	if _, err := s.write.DB.Exec(query); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}
