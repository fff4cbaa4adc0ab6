#!/usr/bin/env bash
# End-to-end test of the chart and both images on the current kubectl context, in a namespace of
# its own with the Pod Security Standard `restricted` enforced. Arguments are passed to helm, e.g.
#   chart/e2e.sh --set distrib=minikube --set-string image.tag=dev
# Needs kubectl, helm, curl, and the reference agent's image as example/template.json names it. The
# agents fetch the example's requirements from PyPI, or from what agent.podTemplate sets up.
set -euo pipefail
cd "$(dirname "$0")/.."

namespace=armada-e2e-$(date +%s)
release=armada
helm_args=("$@")
forward_log=$(mktemp)
forward_pid=

k() { kubectl --namespace "$namespace" "$@"; }
step() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# eventually SECONDS WHAT COMMAND...: run the command until it succeeds
eventually() {
    local seconds=$1 what=$2 deadline=$((SECONDS + $1))
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || fail "$what: not within $seconds s"
        sleep 1
    done
}

finish() {
    local status=$?
    if [[ -n $forward_pid ]]; then kill "$forward_pid" 2>/dev/null || true; fi
    rm -f "$forward_log"
    if ((status)); then
        step "what the cluster looked like"
        k get all,jobs,pvc -o wide || true
        k get events --sort-by=.lastTimestamp | tail -n 40 || true
        for component in orchestrator test redis rabbitmq; do
            k logs --tail=50 -l app.kubernetes.io/component=$component || true
        done
        k logs --tail=20 --prefix -l app.kubernetes.io/managed-by=armada-orchestrator || true
    fi
    kubectl delete namespace "$namespace" --wait=false >/dev/null 2>&1 || true
    exit "$status"
}
trap finish EXIT

secret() { k get secret "$1" -o "jsonpath={.data.$2}" | base64 -d; }
annotation() { k get jobs -l "armada.services/run-id=$1" -o "jsonpath={.items[0].metadata.annotations.armada\.services/$2}"; }
redis() { k exec "$release-redis-0" -- redis-cli --raw "$@"; }
rabbitmqctl() { k exec "$release-rabbitmq-0" -- rabbitmqctl --quiet "$@"; }
json() { sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p"; }

forwarded() { url=$(sed -n 's/^Forwarding from \(127[0-9.]*:[0-9]*\) .*/http:\/\/\1/p' "$forward_log") && [[ $url ]]; }
forward() {
    kubectl --namespace "$namespace" port-forward "svc/$release-orchestrator" :8080 >"$forward_log" 2>&1 &
    forward_pid=$!
    eventually 30 "port-forward" forwarded
}

# call QUERY ARGUMENT...: ask /bot/start, print the answer. The token goes through a pipe, since
# everybody on this machine can read the arguments of a process.
call() {
    local query=$1
    shift
    secret $release-api-token token | sed 's/^/Authorization: Bearer /' |
        curl --silent --show-error --fail-with-body --max-time 120 --header @- "$@" "$url/bot/start$query"
}
# start ARGUMENT...: post a run. book RUN NAME: what GET tells of it.
start() { call "" "$@"; }
book() { call "?run_id=$1" | json "$2"; }

# slow SECONDS: post a run of 40 jobs for two agents, print its id
slow() {
    local image_name image_version answer
    image_name=$(json image_name <example/template.json)
    image_version=$(json image_version <example/template.json)
    answer=$(start -F data_job= -F data_agent= --form-string "configtemplate={\"run_message\":
        {\"image_name\": \"$image_name\", \"image_version\": \"${image_version:-latest}\",
        \"number_of_agents\": 2, \"number_of_jobs\": 40, \"agent_cpu\": \"100m\", \"agent_memory\": \"128Mi\"},
        \"default_agent_message\": {}, \"default_job_message\": {}}" --form-string "python_code=
import time
@app.task(name='tasks.consume_message', acks_late=True)
def consume(message): time.sleep($1)") || fail "the run was not accepted: $answer"
    json run_uuid <<<"$answer"
}

# In the conditions below a question that the cluster does not answer is a no.

ended() { [[ $(book "$1" ended) == *Z ]]; }

agents() { k get pods -l "armada.services/run-id=$1" --field-selector status.phase=Running -o name; }

agents_up() { [[ $(k get jobs -l "armada.services/run-id=$1" -o 'jsonpath={.items[0].status.ready}') == "$2" ]]; }

replaced() { agents_up "$1" 2 && [[ $(agents "$1") != *"$2"* ]]; }

# expect WHAT FOUND EXPECTED
expect() { [[ $2 == "$3" ]] || fail "$1 is $2, not $3"; }

# closed RUN JOBS: all of a run's jobs succeeded, as its books and its Kubernetes Job say
closed() {
    local name
    for name in phase=succeeded "jobs=$2" "succeeded=$2" failed=0 left=0; do
        expect "${name%=*} in the books" "$(book "$1" "${name%=*}")" "${name#*=}"
    done
    for name in phase=succeeded "jobs=$2" "jobs-succeeded=$2" jobs-failed=0 jobs-left=0; do
        expect "the annotation ${name%=*}" "$(annotation "$1" "${name%=*}")" "${name#*=}"
    done
    k wait --for=condition=complete --timeout=60s jobs -l "armada.services/run-id=$1"
}

nothing_of() {
    local pods keys queues exchanges
    pods=$(k get pods -l "armada.services/run-id=$1" --field-selector status.phase!=Succeeded -o name) &&
        keys=$(redis --scan --pattern "$1*") &&
        queues=$(rabbitmqctl list_queues name) &&
        exchanges=$(rabbitmqctl list_exchanges name) &&
        [[ -z $pods$keys && $queues$exchanges != *"$1"* ]]
}

# Of what the release made; what else a platform puts into each namespace is not looked at.
nothing_left() {
    local kinds=all,pvc,secrets,configmaps,serviceaccounts,roles,rolebindings,networkpolicies,pdb,ingress left
    left=$(k get $kinds -l "app.kubernetes.io/instance=$release" -o name &&
        k get secrets -l "owner=helm,name=$release" -o name &&
        k get jobs,pods -l app.kubernetes.io/managed-by=armada-orchestrator -o name) || return
    [[ -z $left ]] || { echo "still there: ${left//$'\n'/ }"; false; }
}

step "install into $namespace"
kubectl create namespace "$namespace"
kubectl label namespace "$namespace" pod-security.kubernetes.io/enforce=restricted
helm install "$release" chart --namespace "$namespace" "${helm_args[@]}" --wait --timeout 10m

step "helm test"
helm test "$release" --namespace "$namespace"

step "a run without the token is refused"
forward
status=$(curl --silent --output /dev/null --write-out '%{http_code}' -X POST "$url/bot/start")
[[ $status == 401 ]] || fail "expected 401, got $status"

step "the example runs to its end"
answer=$(start -F configtemplate=@example/template.json -F data_job=@example/jobs.csv \
    -F data_agent=@example/agents.csv -F python_code=@example/script.py \
    -F requirements_txt=@example/requirements.txt \
    --form-string "configtune={\"URL\": \"http://$release-orchestrator:8080/health\"}") ||
    fail "the example was not accepted: $answer"
echo "$answer"
run=$(json run_uuid <<<"$answer")
jobs=$(json jobs <<<"$answer")
eventually 600 "the run ends" ended "$run"
k get events --field-selector "involvedObject.kind=Job"
closed "$run" "$jobs"
eventually 60 "queue and keys of the run are gone" nothing_of "$run"

step "a pod that is deleted is replaced, and every job is done"
run=$(slow 2)
eventually 120 "both agents are up" agents_up "$run" 2
gone=$(agents "$run" | head -n 1)
k delete --wait=false "$gone"
eventually 120 "another pod has taken its place" replaced "$run" "$gone"
eventually 300 "the run ends" ended "$run"
closed "$run" 40
expect "the number of restarts" "$(book "$run" restarts)" 0

step "DELETE cancels a run, and then drops it"
run=$(slow 30)
eventually 120 "both agents are up" agents_up "$run" 2
call "?run_id=$run" -X DELETE
eventually 120 "pods, queue and keys of the cancelled run are gone" nothing_of "$run"
eventually 60 "the books are closed" ended "$run"
expect "the phase" "$(book "$run" phase)" cancelled
call "?run_id=$run" -X DELETE
if call "?run_id=$run"; then fail "the run that was dropped is still known"; fi

step "kubectl delete job cancels a run"
run=$(slow 30)
eventually 120 "both agents are up" agents_up "$run" 2
k delete job -l "armada.services/run-id=$run"
eventually 120 "pods, queue and keys of the cancelled run are gone" nothing_of "$run"
eventually 60 "the books are closed" ended "$run"
expect "the phase" "$(book "$run" phase)" cancelled

step "an upgrade keeps the generated passwords"
before=$(secret $release-rabbitmq url) token=$(secret $release-api-token token)
[[ $before == amqp://armada:*@* && $token ]] || fail "there are no generated passwords"
helm upgrade "$release" chart --namespace "$namespace" "${helm_args[@]}" --set replicas=2 --wait --timeout 10m
[[ $(secret $release-rabbitmq url) == "$before" ]] || fail "the RabbitMQ password changed"
[[ $(secret $release-api-token token) == "$token" ]] || fail "the API token changed"
helm test "$release" --namespace "$namespace"

step "uninstall leaves nothing"
k delete jobs -l app.kubernetes.io/managed-by=armada-orchestrator
helm uninstall "$release" --namespace "$namespace" --wait
eventually 180 "everything is gone" nothing_left

step "passed"
