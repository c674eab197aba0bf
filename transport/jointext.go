package transport

import (
	"encoding/base64"
	"encoding/json"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// What is carried by hand where an agent cannot reach the server to join: a
// JoinRequest (without secret) one way, a JoinResponse the other. Neither holds
// a secret; who carries them vouches that they arrive unchanged.
const (
	RequestPrefix = "sbrequest1."
	AnswerPrefix  = "sbanswer1."
)

// JoinText returns v as one line of text.
func JoinText(prefix string, v any) string {
	data, _ := json.Marshal(v) // strings: never fails
	return prefix + base64.RawURLEncoding.EncodeToString(data)
}

// ParseJoinText is the inverse of JoinText. CodeInvalid: the text is damaged.
func ParseJoinText[T any](prefix, text string) (T, error) {
	var v T
	body, ok := strings.CutPrefix(strings.TrimSpace(text), prefix)
	data, err := base64.RawURLEncoding.DecodeString(body)
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if !ok || err != nil {
		return v, switchback.Errorf(switchback.CodeInvalid, "this text is not whole").WithHint("copy it again, from %q to the end of the line", prefix)
	}
	return v, nil
}
