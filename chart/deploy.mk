# Deploying, and looking at what is deployed. Included by the Makefile at the top, and run from there.

# minikube: images are built inside it. kube: the current kubectl context, images from a registry.
DISTRIB ?= minikube
RELEASE ?= armada
# Empty means the context's own
NAMESPACE ?=
# More arguments for helm, e.g. HELM_ARGS="--values my-values.yaml"
HELM_ARGS ?=
DOCKER_HUB_USERNAME ?= armadasvc

IMAGE_FILES := Dockerfile requirements.txt app.py merge.py agent.py

ifeq ($(DISTRIB),minikube)
export MINIKUBE_PROFILE ?= minikube
# By name: the current context may be another cluster
CONTEXT ?= $(MINIKUBE_PROFILE)
# A hash of what is in the images, so that a changed image is rolled out and an unchanged one is not
HASH = $(shell cat $(IMAGE_FILES) | git hash-object --stdin | cut -c1-12)
deploy minikube-images: TAG ?= $(HASH)
endif
ON_MINIKUBE = $(and $(CONTEXT),$(filter $(CONTEXT),$(shell kubectl config current-context)))

CLUSTER = $(if $(NAMESPACE),--namespace $(NAMESPACE))
HELM = helm $(if $(CONTEXT),--kube-context $(CONTEXT)) $(CLUSTER)
KUBECTL = kubectl $(if $(CONTEXT),--context $(CONTEXT)) $(CLUSTER)
CHART_VALUES = --set distrib=$(DISTRIB) --set dockerHubUsername=$(DOCKER_HUB_USERNAME) \
	$(if $(TAG),--set-string image.tag=$(TAG)) $(HELM_ARGS)
RUNS = -l app.kubernetes.io/managed-by=armada-orchestrator

.PHONY: deploy undeploy k8s-jobs e2e scan minikube-images

deploy: $(if $(filter minikube,$(DISTRIB)),minikube-images) ## Deploy to minikube, or with DISTRIB=kube to the current kubectl context
	$(HELM) upgrade --install $(RELEASE) chart $(if $(NAMESPACE),--create-namespace) \
		$(CHART_VALUES) --wait --timeout 10m

# The loop looks for the image after building it, since minikube reports success for failed builds.
minikube-images:
	minikube status >/dev/null || minikube start
	@set -e; context=$$(mktemp -d); trap 'rm -rf "$$context"' EXIT; cp $(IMAGE_FILES) "$$context"; \
	case $$($(KUBECTL) get nodes -o jsonpath='{.items[0].status.nodeInfo.containerRuntimeVersion}') in \
		containerd*) option=opt=target ;; \
		*) option=target ;; \
	esac; \
	for target in orchestrator agent; do \
		image=$(DOCKER_HUB_USERNAME)/armada-$$target:$(TAG); \
		built() { minikube image ls | grep -q "$$image\$$"; }; \
		built || { \
			echo "building $$image in minikube"; \
			minikube image build --build-opt=$$option=$$target -t $$image "$$context"; \
			built || { echo "$$image was not built" >&2; exit 1; }; \
		}; \
	done; \
	minikube image tag $$image $(DOCKER_HUB_USERNAME)/armada-agent:latest

undeploy: ## Cancel the runs in flight and uninstall, volumes included
	$(KUBECTL) delete jobs $(RUNS)
	$(HELM) uninstall $(RELEASE) --wait

k8s-jobs: ## Show the runs' Kubernetes Jobs: phase, numbers of jobs, agents up
	@$(KUBECTL) get jobs $(RUNS) -o custom-columns-file=chart/status.columns

# On minikube with images of the tree as it is; elsewhere with those of the chart's version, or TAG.
e2e: TAG ?= $(if $(ON_MINIKUBE),$(HASH))
e2e: ## Test install, run, cancel, upgrade and uninstall on the current kubectl context
	$(if $(ON_MINIKUBE),$(MAKE) minikube-images)
	bash chart/e2e.sh $(CHART_VALUES)

# An environment of its own: checkov pins versions that the tests do not want.
.venv-scan/ready: chart/deploy.mk | $(VENV)/ready
	@uv=$$(command -v uv || echo .uv/bin/uv); \
	$(FIND_PYTHON) $$uv venv -q --clear --python '>=3.12,<3.14' .venv-scan && \
	$$uv pip install -q --python .venv-scan checkov==3.3.30 helm-python-sdk==0.2.2 pyyaml==6.0.3
	@touch $@

scan: .venv-scan/ready ## Scan the rendered chart for weak settings
	@.venv-scan/bin/python chart/render.py > .venv-scan/chart.yaml
	.venv-scan/bin/checkov --config-file chart/.checkov.yaml --file .venv-scan/chart.yaml
