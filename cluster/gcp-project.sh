#!/bin/sh
# What gcp-gpu.yaml and gcp-tpu-pod.yaml need once per project, made by somebody who may set its policy:
#
#   sh cluster/gcp-project.sh PROJECT YOUR.ADDRESS/32 [REGION]
#
# A network that takes ssh from one address only, two service accounts with the least rights, a bucket. Run it again as you like.
set -eu
[ $# -ge 2 ] || { echo "usage: sh cluster/gcp-project.sh PROJECT YOUR.ADDRESS/32 [REGION]" >&2; exit 2; }
project=$1 address=$2 region=${3:-us-central1}
case $address in
    *.*.*.*/32) ;;
    *) echo "gcp-project.sh: $address is no single address; expected one as 203.0.113.7/32" >&2; exit 2 ;;
esac
export CLOUDSDK_CORE_PROJECT="$project"
there() { "$@" >/dev/null 2>&1; }

gcloud services enable compute.googleapis.com tpu.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com

# ── Network ────────────────────────────────────────────────────────────────────────────────────────────────────────
there gcloud compute networks describe simclr || gcloud compute networks create simclr --subnet-mode=custom
there gcloud compute networks subnets describe simclr --region="$region" ||
    gcloud compute networks subnets create simclr --network=simclr --region="$region" --range=10.20.0.0/16 --enable-private-ip-google-access
there gcloud compute firewall-rules describe simclr-ssh ||
    gcloud compute firewall-rules create simclr-ssh --network=simclr --allow=tcp:22 --source-ranges="$address"
gcloud compute firewall-rules update simclr-ssh --source-ranges="$address"
there gcloud compute firewall-rules describe simclr-between ||
    gcloud compute firewall-rules create simclr-between --network=simclr --allow=tcp,udp,icmp --source-ranges=10.20.0.0/16

# ── Bucket ─────────────────────────────────────────────────────────────────────────────────────────────────────────
bucket=simclr-$project
there gcloud storage buckets describe "gs://$bucket" ||
    gcloud storage buckets create "gs://$bucket" --location="$region" --uniform-bucket-level-access --public-access-prevention
# Names of buckets are the whole world's, and somebody else may have made this one: then shards and runs would be theirs.
number=$(gcloud projects describe "$project" --format='value(projectNumber)')
owner=$(gcloud storage buckets describe "gs://$bucket" --raw --format='value(projectNumber)')
if [ -z "$number" ] || [ "$owner" != "$number" ]; then
    echo "gcp-project.sh: gs://$bucket is of project ${owner:-unknown}, expected $project's own number $number; take a project with another id" >&2
    exit 1
fi
# What a node deletes or overwrites can be brought back for a week; no account of the cluster may shorten that.
gcloud storage buckets update "gs://$bucket" --uniform-bucket-level-access --public-access-prevention --soft-delete-duration=7d

# ── Accounts: workers read the bucket and write runs; the head also writes MLflow's artifacts, and makes and removes nodes ──
account() { echo "serviceAccount:$1@$project.iam.gserviceaccount.com"; }
on_bucket() { gcloud storage buckets add-iam-policy-binding "gs://$bucket" --member="$(account "$1")" --role="$2" --condition="$3" >/dev/null; }
objects=projects/_/buckets/$bucket/objects
runs="resource.name.startsWith(\"$objects/runs/\")"
for name in simclr-worker simclr-head; do
    email=$name@$project.iam.gserviceaccount.com
    there gcloud iam service-accounts describe "$email" || gcloud iam service-accounts create "$name"
    # Earlier versions of this script let every node write the whole bucket.
    there gcloud storage buckets remove-iam-policy-binding "gs://$bucket" --member="serviceAccount:$email" --role=roles/storage.objectUser --condition=None || true
    on_bucket "$name" roles/storage.objectViewer None
    on_bucket "$name" roles/storage.legacyBucketReader None     # the bucket's project, which bootstrap.sh compares with the node's
done
on_bucket simclr-worker roles/storage.objectUser "expression=$runs,title=runs"
on_bucket simclr-head roles/storage.objectUser "expression=$runs || resource.name.startsWith(\"$objects/mlflow/\"),title=runs-and-mlflow"

head=$(account simclr-head)
role() {    # NAME PERMISSIONS: made, or brought to these permissions
    if there gcloud iam roles describe "$1" --project="$project"; then
        gcloud iam roles update "$1" --project="$project" --permissions="$2" --quiet >/dev/null
    else
        gcloud iam roles create "$1" --project="$project" --title="$1" --permissions="$2" --quiet >/dev/null
    fi
}
on_project() { gcloud projects add-iam-policy-binding "$project" --member="$head" --role="projects/$project/roles/$1" --condition="$2" >/dev/null; }
# Machines and disks whose names are those of Ray's nodes of a cluster `simclr` or `simclr-tpu`, and no others of the project.
ours() { echo "(resource.type == \"compute.googleapis.com/$1\" && resource.name.extract(\"/$2/{name}\").startsWith(\"ray-simclr-\"))"; }
role simclrNodes compute.instances.create,compute.instances.delete,compute.instances.get,compute.instances.setLabels,compute.instances.setServiceAccount,compute.disks.create
on_project simclrNodes "expression=$(ours Instance instances) || $(ours Disk disks),title=nodes-of-simclr"
# Google has no condition by name for these: a list is of the whole project, operations have names of their own, TPUs know no conditions.
role simclrLook compute.instances.list,compute.zoneOperations.get
on_project simclrLook None
role simclrTpus tpu.nodes.create,tpu.nodes.delete,tpu.nodes.get,tpu.nodes.list,tpu.nodes.update,tpu.operations.get
on_project simclrTpus None
gcloud compute networks subnets add-iam-policy-binding simclr --region="$region" --member="$head" --role=roles/compute.networkUser >/dev/null
gcloud iam service-accounts add-iam-policy-binding "simclr-worker@$project.iam.gserviceaccount.com" \
    --member="$head" --role=roles/iam.serviceAccountUser >/dev/null
# Earlier versions of this script gave these on the whole project.
for wide in roles/compute.instanceAdmin.v1 roles/compute.networkUser roles/tpu.admin; do
    there gcloud projects remove-iam-policy-binding "$project" --member="$head" --role="$wide" --condition=None || true
done
echo "shards and runs go to gs://$bucket, on every node /mnt/simclr"
