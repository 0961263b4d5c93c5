//! A server with the demo model, and a client that sends bytes as they are.
#![allow(dead_code, clippy::unwrap_used, reason = "tests; each file uses a part")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use oxseek_backend_cpu::{CpuBackend, CpuOptions};
use oxseek_engine::{Engine, EngineHandle, EngineOptions, Sampling};
use oxseek_model::{DeepSeek, LoadOptions, kv::blocks_for};
use oxseek_server::{AppState, Dialect, Model, ServerOptions};
use oxseek_tensor::CacheFormat;
use oxseek_text::{ChatTemplate, Tokenizer};
use oxseek_weights::Checkpoint;
use serde_json::Value;
use tokio::{runtime::Runtime, sync::oneshot};

pub const CONTEXT_TOKENS: usize = 512;
/// Rows of one step that prompts may be scored with.
const SCORE_ROWS: usize = 8;

/// A server on a free port; it stops when this is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub state: AppState,
    stop: Option<oneshot::Sender<()>>,
    running: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
    runtime: Option<Runtime>,
}

impl Server {
    /// A server whose model is not there yet.
    pub fn loading() -> Self {
        Self::with(ServerOptions::default())
    }

    /// As [`Server::loading`], set up as told.
    pub fn with(options: ServerOptions) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let state = AppState::new(options);
        let (stop, stopped) = oneshot::channel();
        let running = runtime.spawn(oxseek_server::serve(listener, state.clone(), async {
            let _ = stopped.await;
        }));
        Self { address, state, stop: Some(stop), running: Some(running), runtime: Some(runtime) }
    }

    /// A server that answers with the demo model, `parallel` sequences at a time and `queue` waiting.
    pub fn ready(parallel: usize, queue: usize) -> (Self, EngineHandle) {
        let server = Self::loading();
        let engine = server.load(parallel, queue);
        (server, engine)
    }

    pub fn load(&self, parallel: usize, queue: usize) -> EngineHandle {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let tokenizer_config = checkpoint.file("tokenizer_config.json");
        let tokenizer =
            Tokenizer::from_bytes(checkpoint.file("tokenizer.json").unwrap(), tokenizer_config).unwrap();
        let backend = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let options = LoadOptions {
            context_tokens_max: CONTEXT_TOKENS,
            cache_blocks: parallel * blocks_for(CONTEXT_TOKENS),
            step_rows_max: 64,
            logit_rows_max: parallel + SCORE_ROWS,
            cache_format: CacheFormat::F32,
        };
        let model = DeepSeek::load(&checkpoint, Box::new(backend), options, &mut |_, _| {}).unwrap();
        let config = checkpoint.config();
        let (bos, eos) = (config.bos_token_id.unwrap(), config.eos_token_ids[0]);
        let engine_options = EngineOptions {
            sequences_max: parallel,
            queue_requests_max: queue,
            step_tokens_max: 64,
            eos_tokens: config.eos_token_ids.clone(),
            vocab_text: tokenizer.vocab_len(),
            ..EngineOptions::default()
        };
        let (bos, eos) = (tokenizer.decode(&[bos]), tokenizer.decode(&[eos]));
        let engine = Engine::start(Box::new(model), Arc::new(tokenizer), engine_options);
        let template = ChatTemplate::from_files(tokenizer_config, None).unwrap();
        self.state.ready(Model {
            name: "oxseek-demo".into(),
            dialect: Dialect::new(template.as_ref(), engine.tokenizer()),
            engine: engine.clone(),
            template,
            bos,
            eos,
            sampling: Sampling::default(),
        });
        engine
    }

    /// Sends `bytes` and reads until the server closes.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        Answer::parse(&answer)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    pub fn post(&self, path: &str, body: &[u8]) -> Answer {
        self.raw(&post_bytes(path, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
    }

    /// As [`Server::get`], with lines of headers that end in CR LF.
    pub fn get_with(&self, path: &str, headers: &str) -> Answer {
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        self.raw(head.as_bytes())
    }

    /// As [`Server::post`], with lines of headers that end in CR LF.
    pub fn post_with(&self, path: &str, headers: &str, body: &[u8]) -> Answer {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
             {headers}content-length: {}\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    /// The first value of a metric, whatever its labels.
    pub fn metric(&self, name: &str, headers: &str) -> f64 {
        let answer = self.get_with("/metrics", headers);
        assert_eq!(answer.status, 200, "{answer:?}");
        let row = answer.body.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        row.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Tells the server to stop; answers how it ended.
    pub fn stop(mut self) -> std::io::Result<()> {
        let _ = self.stop.take().unwrap().send(());
        let running = self.running.take().unwrap();
        self.runtime.as_ref().unwrap().block_on(running).unwrap()
    }

    /// Waits for the end of a server that was told to stop.
    pub fn ended(&mut self) -> std::io::Result<()> {
        let running = self.running.take().unwrap();
        self.runtime.as_ref().unwrap().block_on(running).unwrap()
    }

    pub fn begin_stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn post_bytes(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            unchunk(body)
        } else {
            body.to_string()
        };
        Self { status, head: head.to_ascii_lowercase(), body }
    }

    /// A header's value; names in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

fn unchunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let n = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if n == 0 {
            break;
        }
        out.push_str(&rest[..n]);
        body = rest[n..].trim_start_matches("\r\n");
    }
    out
}

/// Waits for what happens soon after an answer was sent.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("waited 10 s for {what}");
}
