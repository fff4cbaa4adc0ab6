{{/* Base of every name. 43 characters leave room for `-rabbitmq` and the hash that a StatefulSet adds in a label. */}}
{{- define "armada.fullname" -}}
{{- .Release.Name | trunc 43 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels by which a component's pods are selected; call with (list $ "component"). */}}
{{- define "armada.selector" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{- define "armada.labels" -}}
{{- $root := first . -}}
{{ include "armada.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The label that every agent's pod carries, of whatever run. */}}
{{- define "armada.agentSelector" -}}
app.kubernetes.io/managed-by: armada-orchestrator
{{- end -}}

{{/* What the Pod Security Standard `restricted` asks for; call with the uid. */}}
{{- define "armada.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "armada.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Pull secrets and placement of the chart's own pods. */}}
{{- define "armada.podDefaults" -}}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "armada.image" -}}
{{- $repository := .Values.image.repository | default (printf "%s/armada-orchestrator" .Values.dockerHubUsername) -}}
image: {{ printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) }}
imagePullPolicy: {{ eq .Values.distrib "minikube" | ternary "Never" "IfNotPresent" }}
{{- end -}}

{{- define "armada.apiTokenSecret" -}}
{{- .Values.apiToken.existingSecret | default (printf "%s-api-token" (include "armada.fullname" .)) -}}
{{- end -}}

{{/*
Names by which the orchestrator is asked for. Without a token it answers to no others, lest a page in
somebody's browser reach it by a name of its own.
*/}}
{{- define "armada.hosts" -}}
{{- $name := printf "%s-orchestrator" (include "armada.fullname" .) -}}
{{- $hosts := list $name -}}
{{- range list "" ".svc" ".svc.cluster.local" -}}
{{- $hosts = append $hosts (printf "%s.%s%s" $name $.Release.Namespace .) -}}
{{- end -}}
{{- if .Values.ingress.enabled }}{{ $hosts = append $hosts .Values.ingress.host }}{{ end -}}
{{- with .Values.env.ALLOWED_HOSTS }}{{ $hosts = append $hosts . }}{{ end -}}
{{- join "," $hosts -}}
{{- end -}}

{{/* Bytes for the uploads at work: twice of what the orchestrator lets in. */}}
{{- define "armada.spool" -}}
{{- $upload := .Values.env.MAX_UPLOAD_BYTES | default 134217728 | int64 -}}
{{- $starts := .Values.env.MAX_CONCURRENT_STARTS | default 4 | int64 -}}
{{- mul 2 $upload $starts -}}
{{- end -}}

{{- define "armada.redisHost" -}}
{{- if .Values.redis.enabled -}}
{{ include "armada.fullname" . }}-redis
{{- else -}}
{{ required "externalRedis.host must be set when redis.enabled is false" .Values.externalRedis.host }}
{{- end -}}
{{- end -}}

{{/* Secret that holds the AMQP URL, for the orchestrator and for every agent. */}}
{{- define "armada.rabbitmqSecret" -}}
{{- if .Values.rabbitmq.enabled -}}
{{ .Values.rabbitmq.existingSecret | default (printf "%s-rabbitmq" (include "armada.fullname" .)) }}
{{- else -}}
{{ required "externalRabbitmq.existingSecret must be set when rabbitmq.enabled is false" .Values.externalRabbitmq.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "armada.rabbitmqKey" -}}
{{- .Values.rabbitmq.enabled | ternary "url" .Values.externalRabbitmq.key -}}
{{- end -}}

{{/*
A password that survives upgrades: read back from the Secret where it exists, else generated;
call with (list $ "secret" "key"). Each call generates anew, so call once per password.
*/}}
{{- define "armada.password" -}}
{{- $secret := lookup "v1" "Secret" (first .).Release.Namespace (index . 1) -}}
{{- get ($secret.data | default dict) (last .) | b64dec | default (randAlphaNum 32) -}}
{{- end -}}

{{/*
So many percent of a component's memory limit, in bytes; empty where it has none; call with
(list .Values.redis.resources 75).
*/}}
{{- define "armada.memory" -}}
{{- with dig "limits" "memory" "" (first .) -}}
{{- $quantity := kindIs "string" . | ternary . (int64 . | toString) -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (regexFind "^[0-9.]+" $quantity) (get $units (regexFind "[A-Za-z]*$" $quantity)) (last $) 0.01 | floor | int64 -}}
{{- end -}}
{{- end -}}

{{/*
The operator's pod template for agents, completed: the agents' own ServiceAccount, and the
variables below in the container `agent`. What the operator sets under the same name stays.
*/}}
{{- define "armada.agentPodTemplate" -}}
{{- $template := deepCopy .Values.agent.podTemplate -}}
{{- $spec := $template.spec | default dict -}}
{{- if not $spec.serviceAccountName -}}
{{- $_ := set $spec "serviceAccountName" (printf "%s-agent" (include "armada.fullname" .)) -}}
{{- end -}}
{{- $agent := dict "name" "agent" -}}
{{- $others := list -}}
{{- range $spec.containers -}}
{{- if eq .name "agent" }}{{ $agent = . }}{{ else }}{{ $others = append $others . }}{{ end -}}
{{- end -}}
{{- $env := list -}}
{{- range $agent.env }}{{ $env = append $env .name }}{{ end -}}
{{- $added := list -}}
{{- /* Agents run as a uid that their image may not know, whose HOME would be /, not writable. */ -}}
{{- if not (has "HOME" $env) }}{{ $added = append $added (dict "name" "HOME" "value" "/tmp") }}{{ end -}}
{{- range list "SQL_SERVER_NAME" "SQL_SERVER_DB" "SQL_SERVER_USER" "SQL_SERVER_PASSWORD" -}}
{{- if not (has . $env) -}}
{{- $ref := dict "name" "armada-sql-server-secret" "key" . "optional" true -}}
{{- $added = append $added (dict "name" . "valueFrom" (dict "secretKeyRef" $ref)) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $agent "env" (concat $added ($agent.env | default list)) -}}
{{- $_ := set $spec "containers" (prepend $others $agent) -}}
{{- $_ := set $template "spec" $spec -}}
{{- toYaml $template -}}
{{- end -}}

{{/*
Volume of a StatefulSet; call with its persistence values. It goes with the release: kept, it would
hold a RabbitMQ user whose generated password is gone.
*/}}
{{- define "armada.volumeClaim" -}}
{{- if .enabled -}}
persistentVolumeClaimRetentionPolicy:
  whenDeleted: Delete
  whenScaled: Retain
volumeClaimTemplates:
  - metadata:
      name: data
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources:
        requests:
          storage: {{ .size }}
{{- end -}}
{{- end -}}
