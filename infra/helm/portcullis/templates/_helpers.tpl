{{/* The release's name, or its name and the chart's; with the longest of what follows it, …-fallback-model-batch-metrics, 63 characters. */}}
{{- define "portcullis.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 34 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 34 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What runs, as YAML: by name, each with its service's code name, whether it is one of several, and its values. */}}
{{- define "portcullis.components" -}}
{{- range $service, $values := .Values.services }}
{{- if or (ne $service "console") $values.enabled }}
{{ $service | replace "_" "-" }}:
  service: {{ $service }}
  batch: false
  single: {{ eq $service "console" }}
  http: {{ has $service (list "edge" "console") }}
  values: {{ $values | toJson }}
{{- end }}
{{- end }}
{{- if .Values.batchPool.enabled }}
fallback-model-batch:
  service: fallback_model
  batch: true
  single: false
  http: false
  values: {{ .Values.batchPool | toJson }}
{{- end }}
{{- end }}

{{/* Call with (list $ name). */}}
{{- define "portcullis.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "portcullis.labels" -}}
{{ include "portcullis.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{/* Call with (list $ service), the code's name of it. */}}
{{- define "portcullis.image" -}}
{{- $image := (index . 0).Values.image -}}
{{ with $image.registry }}{{ . }}/{{ end }}{{ $image.repositoryPrefix }}{{ index . 1 | replace "_" "-" }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end }}

{{- define "portcullis.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Whether KEDA or an HPA sets the number of a component's pods. Call with (list $ component). */}}
{{- define "portcullis.isScaled" -}}
{{- $component := index . 1 -}}
{{- if eq $component.service "fallback_model" }}{{ if (index . 0).Values.keda.enabled }}true{{ end }}
{{- else if $component.values.autoscaling }}{{ if $component.values.autoscaling.enabled }}true{{ end }}{{ end }}
{{- end }}

{{/* Longer than a process takes at the most: the balancer's time, the front's drain, the bus's drain, and what is told at the end. */}}
{{- define "portcullis.graceSeconds" -}}
{{- add (.Values.services.edge.preStopSeconds) (mul 2 .Values.drainSeconds) 15 -}}
{{- end }}

{{- define "portcullis.priorityClass" -}}
{{- $of := index (index . 0).Values.priorityClasses (index . 1) -}}
{{- if (index . 0).Values.priorityClasses.create -}}
{{ (index . 0).Release.Namespace }}-{{ include "portcullis.fullname" (index . 0) }}-{{ index . 1 }}
{{- else }}{{ $of.name }}{{ end }}
{{- end }}

{{- define "portcullis.consoleUrl" -}}
http://{{ include "portcullis.fullname" . }}-console:4318
{{- end }}

{{- define "portcullis.otlpEndpoint" -}}
{{- if .Values.tracing.endpoint }}{{ .Values.tracing.endpoint }}{{ else if .Values.services.console.enabled }}{{ include "portcullis.consoleUrl" . }}{{ end }}
{{- end }}

{{- define "portcullis.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef: { name: {{ (index . 1).name }}, key: {{ (index . 1).key | quote }} }
{{- end }}

{{/* The names under which the gateway answers. */}}
{{- define "portcullis.hosts" -}}
{{- $name := printf "%s-edge" (include "portcullis.fullname" .) -}}
{{- $inside := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- concat $inside .Values.services.edge.hosts | join "," -}}
{{- end }}

{{/* A container's whole environment. Call with (list $ component); the component may be the migration's. */}}
{{- define "portcullis.env" -}}
{{- $root := index . 0 }}{{ $component := index . 1 }}{{ $values := $root.Values }}{{ $secrets := $values.secrets -}}
{{- $service := $component.service -}}
{{- if contains "@" $values.nats.url }}{{ fail "nats.url names a user; each service has its own, whose password is in secrets.natsPasswords" }}{{ end -}}
- { name: PORTCULLIS_METRICS_HOST, value: "0.0.0.0" }
- { name: PORTCULLIS_METRICS_PORT, value: "9464" }
- { name: PORTCULLIS_DRAIN_SECONDS, value: {{ $values.drainSeconds | quote }} }
- { name: PORTCULLIS_NATS_URL, value: {{ $values.nats.url | quote }} }
{{- $user := printf "%s%s" $service $values.nats.userSuffix }}
- { name: PORTCULLIS_NATS_USER, value: {{ $user }} }
{{ include "portcullis.secretEnv" (list "PORTCULLIS_NATS_PASSWORD" (dict "name" $secrets.natsPasswords.name "key" $user)) }}
{{- if $values.nats.ca.name }}
- { name: PORTCULLIS_NATS_TLS_CA, value: /etc/portcullis/nats/ca.crt }
{{- end }}
{{- if and (ne $service "console") (include "portcullis.otlpEndpoint" $root) }}
- { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ include "portcullis.otlpEndpoint" $root | quote }} }
{{- end }}
{{- if eq $service "edge" }}
- { name: PORTCULLIS_EDGE_HOST, value: "0.0.0.0" }
- { name: PORTCULLIS_EDGE_PORT, value: "8000" }
- { name: PORTCULLIS_ALLOWED_HOSTS, value: {{ include "portcullis.hosts" $root | quote }} }
{{- if $values.services.console.enabled }}
- { name: PORTCULLIS_CONSOLE_URL, value: {{ include "portcullis.consoleUrl" $root }} }
{{- end }}
{{- else if eq $service "auth" }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_DATABASE_URL" $secrets.database) }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_KEY_PEPPER" $secrets.keyPepper) }}
{{- if $secrets.keyPepperPrevious.name }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_KEY_PEPPER_PREVIOUS" $secrets.keyPepperPrevious) }}
{{- end }}
{{- if $secrets.natsIssuerSeed.name }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_NATS_ISSUER_SEED" $secrets.natsIssuerSeed) }}
{{- end }}
{{- else if eq $service "limiter" }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_REDIS_URL" $secrets.redis) }}
{{- else if and (eq $service "detector_proxy") $secrets.engineToken.name }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_ENGINE_TOKEN" $secrets.engineToken) }}
{{- else if eq $service "console" }}
- { name: PORTCULLIS_CONSOLE_HOST, value: "0.0.0.0" }
- { name: PORTCULLIS_CONSOLE_PORT, value: "4318" }
{{- else if $component.batch }}
- { name: PORTCULLIS_MODEL_BULK_ONLY, value: "true" }
{{- end }}
{{- if and (has $service (list "auth" "console")) $secrets.adminToken.name }}
{{ include "portcullis.secretEnv" (list "PORTCULLIS_ADMIN_TOKEN" $secrets.adminToken) }}
{{- end }}
{{- range $name, $value := mergeOverwrite (deepCopy $values.env) $component.values.env }}
{{- include "portcullis.checkDeadline" (list $root $name $value) }}
- { name: {{ $name }}, value: {{ $value | quote }} }
{{- end }}
{{- end }}

{{/* A deadline that a stop does not wait for would be cut by every upgrade. */}}
{{- define "portcullis.checkDeadline" -}}
{{- if has (index . 1) (list "PORTCULLIS_REQUEST_TIMEOUT_SECONDS" "PORTCULLIS_JOBS_MESSAGE_TIMEOUT_SECONDS") }}
{{- if ge (index . 2 | float64) ((index . 0).Values.drainSeconds | float64) }}
{{- fail (printf "%s is %v, and a pod that stops waits for %v s only: set drainSeconds above it" (index . 1) (index . 2) (index . 0).Values.drainSeconds) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "portcullis.podSecurity" -}}
automountServiceAccountToken: false
# Else a Service called …-edge would set PORTCULLIS_EDGE_PORT=tcp://….
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.podSecurity.runAsUser }}
  runAsGroup: {{ .Values.podSecurity.runAsGroup }}
  fsGroup: {{ .Values.podSecurity.runAsGroup }}
  seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "portcullis.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{- define "portcullis.mounts" -}}
volumeMounts:
  - { name: tmp, mountPath: /tmp }
  {{- if .Values.nats.ca.name }}
  - { name: nats-ca, mountPath: /etc/portcullis/nats, readOnly: true }
  {{- end }}
{{- end }}

{{- define "portcullis.volumes" -}}
volumes:
  - name: tmp
    emptyDir: { sizeLimit: 64Mi }
  {{- if .Values.nats.ca.name }}
  - name: nats-ca
    secret:
      secretName: {{ .Values.nats.ca.name }}
      items: [{ key: {{ .Values.nats.ca.key | quote }}, path: ca.crt }]
  {{- end }}
{{- end }}
