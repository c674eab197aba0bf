package server

import (
	"bytes"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/switchback-dr/switchback/internal/durable"
)

var updateDocument = flag.Bool("update", false, "write docs/api/openapi.yaml anew")

const documentFile = "../docs/api/openapi.yaml"

// TestDocumentIsCurrent: the document in the repository is that of the code.
func TestDocumentIsCurrent(t *testing.T) {
	now, err := Document()
	if err != nil {
		t.Fatal(err)
	}
	if *updateDocument {
		if err := durable.WriteFile(documentFile, now, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(documentFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(now, kept) {
		t.Errorf("%s is stale: make openapi", documentFile)
	}
}

// TestReferencePage: it names every route and needs nothing from elsewhere.
func TestReferencePage(t *testing.T) {
	rt := (&Server{}).routes()
	for path, kind := range map[string]string{"/docs": "text/html; charset=utf-8", "/v1/openapi.yaml": "application/yaml", "/v1/openapi.json": "application/json"} {
		w := httptest.NewRecorder()
		rt.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != http.StatusOK || w.Header().Get("Content-Type") != kind {
			t.Errorf("%s: %d, %s", path, w.Code, w.Header().Get("Content-Type"))
		}
		if path != "/docs" {
			continue
		}
		page := w.Body.String()
		for p := range rt.api.OpenAPI().Paths {
			if !strings.Contains(page, p+"</code>") {
				t.Errorf("the page says nothing of %s", p)
			}
		}
		if out := regexp.MustCompile(`(?:src|href)="(?:https?:)?//[^"]*"|@import|url\(`).FindString(page); out != "" {
			t.Errorf("the page fetches %s", out)
		}
	}
}
