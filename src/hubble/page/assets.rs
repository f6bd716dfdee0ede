//! The built page, which is part of the program.

use std::collections::HashMap;
use std::io::Write;
use std::sync::LazyLock;

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};

use super::refuse;

include!(concat!(env!("OUT_DIR"), "/assets.rs"));

struct Asset {
    plain: &'static [u8],
    packed: Bytes,
    kind: &'static str,
    tag: String,
}

/// Every file of ui/dist by its path; compressed once.
static FILES: LazyLock<HashMap<&'static str, Asset>> =
    LazyLock::new(|| ASSETS.iter().map(|(path, plain)| (*path, Asset::new(path, plain))).collect());

impl Asset {
    fn new(path: &str, plain: &'static [u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        // Into memory: this cannot fail; an empty result is not used.
        let packed = encoder.write_all(plain).and_then(|()| encoder.finish()).unwrap_or_default();
        let digest = Sha256::digest(plain);
        let tag: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        Self { plain, packed: packed.into(), kind: kind(path), tag: format!("\"{tag}\"") }
    }
}

fn kind(path: &str) -> &'static str {
    match path.rsplit('.').next().unwrap_or_default() {
        "html" => "text/html; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "svg" => "image/svg+xml",
        "json" | "map" => "application/json",
        "woff2" => "font/woff2",
        "png" => "image/png",
        "ico" => "image/x-icon",
        _ => "application/octet-stream",
    }
}

/// A file of the page. A path that is none is the page itself: its links are paths.
pub(super) async fn asset(uri: Uri, headers: HeaderMap) -> Response {
    let path = uri.path().trim_start_matches('/');
    if path.starts_with("api/") {
        return refuse(StatusCode::NOT_FOUND, "there is no such part of the API");
    }
    let is_file = path.contains('.');
    let wanted = if path.is_empty() || !is_file { "index.html" } else { path };
    let Some(asset) = FILES.get(wanted) else {
        let words = match FILES.is_empty() {
            true => "this program was built without the page (ui/dist)",
            false => "there is no such file",
        };
        return refuse(StatusCode::NOT_FOUND, words);
    };
    let has = |name, wanted: &str| {
        headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains(wanted))
    };
    let common = [
        (header::ETAG, asset.tag.as_str()),
        (header::CACHE_CONTROL, "no-cache"),
        (header::VARY, "Accept-Encoding"),
    ];
    if has(header::IF_NONE_MATCH, &asset.tag) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    let kind = [(header::CONTENT_TYPE, asset.kind)];
    if has(header::ACCEPT_ENCODING, "gzip") && !asset.packed.is_empty() {
        let encoding = [(header::CONTENT_ENCODING, "gzip")];
        return (common, kind, encoding, asset.packed.clone()).into_response();
    }
    (common, kind, asset.plain).into_response()
}
