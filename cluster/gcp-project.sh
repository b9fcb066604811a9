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
bucket=gs://simclr-$project
there gcloud storage buckets describe "$bucket" ||
    gcloud storage buckets create "$bucket" --location="$region" --uniform-bucket-level-access --public-access-prevention

# ── Accounts: workers reach the bucket, the head makes and removes nodes too ───────────────────────────────────────
for name in simclr-worker simclr-head; do
    email=$name@$project.iam.gserviceaccount.com
    there gcloud iam service-accounts describe "$email" || gcloud iam service-accounts create "$name"
    gcloud storage buckets add-iam-policy-binding "$bucket" --member="serviceAccount:$email" --role=roles/storage.objectUser >/dev/null
done
head=serviceAccount:simclr-head@$project.iam.gserviceaccount.com
for role in roles/compute.instanceAdmin.v1 roles/compute.networkUser roles/tpu.admin; do
    gcloud projects add-iam-policy-binding "$project" --member="$head" --role="$role" --condition=None >/dev/null
done
gcloud iam service-accounts add-iam-policy-binding "simclr-worker@$project.iam.gserviceaccount.com" \
    --member="$head" --role=roles/iam.serviceAccountUser >/dev/null
echo "shards and runs go to $bucket, on every node /mnt/simclr"
