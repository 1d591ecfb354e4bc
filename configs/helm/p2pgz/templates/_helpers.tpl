{{- define "p2pgz.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- define "p2pgz.selector" -}}
app.kubernetes.io/name: p2pgz
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "p2pgz.labels" -}}
{{ include "p2pgz.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "p2pgz.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- /* A configuration file: what the user gave, over it what the kind of node needs, over that what all nodes have.
       Helm's numbers are floating-point ones; the configuration's are not. */ -}}
{{- define "p2pgz.config" -}}
{{- $peers := dict "listen" (list "/ip4/0.0.0.0/tcp/4801") "bootstrap" (list (printf "/dns/%s-seed.%s.svc/tcp/4801" (include "p2pgz.name" .root) .root.Release.Namespace)) }}
{{- if .root.Values.cluster.keySecret }}{{ $_ := set $peers "cluster_key_file" "/run/secrets/p2pgz/cluster.key" }}{{ end }}
{{- $all := dict "version" 1 "http" (dict "listen" ":4802") "peers" $peers }}
{{- $merged := mergeOverwrite (deepCopy .root.Values.config) .own $all }}
{{- regexReplaceAll "(?m)= (-?[0-9]+)\\.0$" (toToml $merged) "= ${1}" }}
{{- end }}
{{- define "p2pgz.probes" -}}
startupProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  # a pool is checked after a power failure
  failureThreshold: 150
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}
