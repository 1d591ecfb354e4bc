// The status page: asks the node for its status and its log once a second and draws what they say. Everything is put in as
// text, never as HTML: names of images and peers are other people's.
"use strict";

const POLL_MS = 1000;
const SLOW_POLL_MS = 5000; // when the node does not answer
const RATES_KEPT = 120;
const PEERS_DRAWN = 24;
const EVENTS_KEPT = 200;
const SOURCES = ["peer", "registry", "pool", "before"];
const NAMES = { peer: "peers", registry: "registry", pool: "this pool", before: "here before" };
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
let paused = false;
let lastEvent = 0;
let lastPid = 0;
let before = null;
let timer = 0;
const rates = [];
const events = [];

// --- writing numbers

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let value = count || 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const percent = (part, whole) => (whole ? `${Math.floor((100 * part) / whole)} %` : "–");
const short = (peer) => (peer && peer.length > 14 ? `${peer.slice(0, 5)}…${peer.slice(-6)}` : peer || "–");

// --- making elements

function element(name, content, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const item of [].concat(content === undefined ? [] : content)) {
    made.append(item instanceof Node ? item : document.createTextNode(String(item)));
  }
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function bar(parts, whole, label) {
  const svg = shape("svg", {
    viewBox: "0 0 1000 16", preserveAspectRatio: "none", role: "progressbar",
    "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": whole ? Math.floor((100 * parts.reduce((sum, [, part]) => sum + part, 0)) / whole) : 0,
  });
  let x = 0;
  for (const [kind, part] of parts) {
    const width = whole ? Math.min(1000 - x, (1000 * part) / whole) : 0;
    if (width > 0) svg.append(shape("rect", { x, y: 0, width, height: 16, class: `of-${kind}` }));
    x += Math.max(0, width);
  }
  return svg;
}

function legend(parts) {
  const list = element("ul", [], "legend");
  for (const [kind, part] of parts) {
    if (part) list.append(element("li", element("span", `${NAMES[kind]} ${bytes(part)}`), `of-${kind}`));
  }
  return list;
}

// --- sections

function showNode(status) {
  const node = status.node;
  byId("node").textContent = `${node.peer_id ? `node ${short(node.peer_id)}, ` : "no peers, "}version ${node.version}, up ${duration(node.uptime_seconds)}`;
  byId("node").title = (node.addrs || []).join("\n") || "no address for peers";
  const alerts = [];
  if (status.pool.state === "full") alerts.push("The pool is full: nothing more is kept. Raise pool.quota_bytes or unpin images.");
  if (status.pool.state === "failing") alerts.push(`The disk refuses writes: ${status.pool.error}`);
  if (node.identity_twins) alerts.push("Another host answers with this node's identity: a cloned state directory?");
  if (status.config.refused) alerts.push(`The new configuration is not in effect: ${status.config.refused}`);
  for (const mount of status.mounts) if (mount.state === "lost") alerts.push(`${mount.dir}: ${mount.error}`);
  byId("alert").textContent = alerts.join(" ");
  byId("alert").hidden = !alerts.length;
}

function showSources(status) {
  const from = status.sources;
  const parts = ["peer", "registry", "pool"].map((kind) => [kind, from[kind].bytes]);
  const total = parts.reduce((sum, [, part]) => sum + part, 0);
  byId("sources-bar").replaceChildren(bar(parts, total, "peers, registries, pool"));
  for (const [kind, part] of parts) {
    byId(`from-${kind}`).textContent = `${bytes(part)}${total ? ` · ${percent(part, total)}` : ""}`;
  }
  const images = new Map();
  for (const image of [...status.seeds, ...status.mounts]) if (image.digest && image.bytes) images.set(image.digest, image.bytes);
  const size = [...images.values()].reduce((sum, count) => sum + count, 0);
  byId("copies").textContent = size ? (from.registry.bytes / size).toFixed(2) : "–";
  byId("registry-line").textContent = `Requests to registries: ${from.registry.requests}, ${bytes(from.registry.wire_bytes)} over the wire; ` +
    `a copy is all bytes of what is mounted or seeded here now (${bytes(size)}). Failed requests to peers: ${from.peer.failures}; ${bytes(from.peer.wasted_bytes)} came twice.`;
}

function showRates(status) {
  const now = performance.now() / 1000;
  const counts = { peer: status.sources.peer.bytes, registry: status.sources.registry.bytes };
  if (before && status.node.pid === lastPid) {
    const passed = Math.max(0.1, now - before.now);
    rates.push({ peer: Math.max(0, counts.peer - before.peer) / passed, registry: Math.max(0, counts.registry - before.registry) / passed });
    if (rates.length > RATES_KEPT) rates.shift();
  }
  before = { now, ...counts };
  const top = Math.max(1, ...rates.map((rate) => Math.max(rate.peer, rate.registry)));
  const lines = ["registry", "peer"].map((kind) => shape("polyline", {
    class: `of-${kind}`,
    points: rates.map((rate, i) => `${600 - (rates.length - 1 - i) * (600 / (RATES_KEPT - 1))},${76 - (72 * rate[kind]) / top}`).join(" "),
  }));
  byId("rates").replaceChildren(...lines);
  const last = rates[rates.length - 1] || { peer: 0, registry: 0 };
  byId("rates-text").textContent = `the last two minutes: peers ${bytes(last.peer)}/s, registries ${bytes(last.registry)}/s now; the most was ${bytes(top === 1 ? 0 : top)}/s`;
}

function showSwarm(status) {
  const grouped = new Map();
  for (const connection of status.peers) {
    const known = grouped.get(connection.peer_id);
    if (!known) { grouped.set(connection.peer_id, { ...connection }); continue; }
    known.received_bytes += connection.received_bytes;
    known.expected_seconds = Math.min(known.expected_seconds, connection.expected_seconds);
    known.seconds = Math.max(known.seconds, connection.seconds);
    known.layers = Math.max(known.layers, connection.layers);
  }
  const peers = [...grouped.values()].sort((a, b) => b.received_bytes - a.received_bytes || (a.peer_id < b.peer_id ? -1 : 1));
  byId("peer-count").textContent = `${peers.length} connected`;
  const rows = peers.map((peer) => {
    const name = element("code", short(peer.peer_id));
    name.title = peer.peer_id;
    const faults = Object.entries(peer.faults || {}).filter(([, count]) => count).map(([fault, count]) => `${count} ${fault}`).join(", ");
    const cells = [
      ["Peer", name], ["Zone", peer.zone || "–"], ["Gave", bytes(peer.received_bytes)], ["Expected wait", duration(peer.expected_seconds)],
      ["Layers", peer.layers], ["Connected", duration(peer.seconds)], ["Faults", faults || "none"],
    ];
    return element("tr", cells.map(([label, content]) => { const cell = element("td", content); cell.dataset.label = label; return cell; }));
  });
  byId("peers").tBodies[0].replaceChildren(...rows);
  byId("peers").hidden = !peers.length;
  const node = status.node;
  const out = node.faulty_peers.length ? `${node.faulty_peers.length} peers have lost their place for now. ` : "";
  const cluster = status.cluster || { members: 0, zones: {} };
  const zones = Object.entries(cluster.zones).filter(([zone]) => zone).map(([zone, count]) => `${zone}: ${count}`).join(", ");
  const leases = status.leases || {};
  byId("cluster-line").textContent = cluster.members < 2 ? "" : `The cluster has ${cluster.members} members${zones ? ` (${zones})` : ""}${cluster.zone ? `; this node is in zone ${cluster.zone}` : ""}. ` +
    `Chunks by lease: ${leases.fetched_chunks || 0} from the registry on behalf of all, ${leases.followed_chunks || 0} from the node that got them.`;
  byId("swarm-line").textContent = peers.length ? `${out}Of ${node.connections_max} connections that may be open; ${node.connections_refused} found no room, ${node.busy_answers} requests of peers were answered with "busy".`
    : node.peer_id ? `${out}No peer is connected: p2pgz node --bootstrap ADDRESS names one to begin with.` : "This node takes no part in a swarm.";
  drawMap(peers);
}

function drawMap(peers) {
  const map = byId("map");
  const drawn = peers.slice(0, PEERS_DRAWN);
  map.toggleAttribute("hidden", !drawn.length);
  const most = Math.max(1, ...drawn.map((peer) => peer.received_bytes));
  const waits = drawn.map((peer) => Math.log10(Math.max(1e-4, peer.expected_seconds)));
  const [least, longest] = [Math.min(...waits), Math.max(...waits)];
  const lines = [], dots = [];
  drawn.forEach((peer, i) => {
    const angle = (2 * Math.PI * i) / drawn.length - Math.PI;
    // the quicker, the nearer
    const radius = 75 + (longest > least ? (55 * (waits[i] - least)) / (longest - least) : 25);
    const x = 160 + radius * Math.cos(angle), y = 108 + 0.65 * radius * Math.sin(angle);
    const width = peer.received_bytes ? 1.5 + 8 * Math.sqrt(peer.received_bytes / most) : 1;
    lines.push(shape("line", { x1: 160, y1: 108, x2: x, y2: y, "stroke-width": width, class: peer.received_bytes ? "" : "idle" }));
    const dot = shape("circle", { cx: x, cy: y, r: 8, class: Object.keys(peer.faults || {}).length ? "faulty" : "peer" });
    dot.append(shape("title", {}, `${peer.peer_id}: gave ${bytes(peer.received_bytes)}, expected wait ${duration(peer.expected_seconds)}`));
    dots.push(dot, shape("text", { x, y: y + 19 }, peer.peer_id.slice(-6)));
  });
  map.replaceChildren(...lines, shape("circle", { cx: 160, cy: 108, r: 12, class: "node" }), ...dots, shape("text", { x: 160, y: 133 }, "this node"));
}

function showMounts(mounts) {
  byId("mount-count").textContent = mounts.length || "";
  const cards = mounts.map((mount) => {
    const parts = SOURCES.map((kind) => [kind, (mount.sources || {})[kind] || 0]);
    const card = element("article", [
      element("h3", mount.dir || "(not attached)"),
      element("p", [element("code", mount.ref)]),
      element("p", `${bytes(mount.present_bytes)} of ${bytes(mount.bytes)} here, ${percent(mount.present_bytes, mount.bytes)}; ${mount.mode} mode, ${mount.state}`, mount.state === "lost" ? "bad" : ""),
    ], "card");
    const holder = element("div", bar(parts, mount.bytes, `${mount.dir}: here`), "bar");
    card.append(holder, legend(parts));
    const start = mount.startup;
    if (start && start.listed_chunks) card.append(element("p", `start-up list: ${bytes(start.prefetched_bytes)} fetched ahead`, "quiet"));
    if (mount.stale_since) card.append(element("p", "The registry could not be asked what the tag means now.", "quiet"));
    return card;
  });
  byId("mount-list").replaceChildren(...(cards.length ? cards : [element("p", "Nothing is mounted: p2pgz mount IMAGE DIR", "quiet")]));
}

function showSeeds(seeds) {
  byId("seed-count").textContent = seeds.length || "";
  const cards = seeds.map((seed) => {
    const card = element("article", [
      element("h3", seed.ref),
      element("p", `${bytes(seed.present_bytes)} of ${bytes(seed.bytes)}, ${percent(seed.present_bytes, seed.bytes)}; ${seed.state}${seed.watch ? ", follows its tag" : ""}`),
      element("div", bar([["peer", seed.present_bytes]], seed.bytes, `${seed.ref}: here`), "bar"),
    ], "card");
    if (seed.error) card.append(element("p", seed.error, "bad"));
    return card;
  });
  byId("seed-list").replaceChildren(...(cards.length ? cards : [element("p", "Nothing is seeded: p2pgz seed IMAGE", "quiet")]));
}

function showPool(pool) {
  const room = pool.quota_bytes || pool.allocated_bytes + pool.free_bytes;
  const pinned = Math.min(pool.pinned_bytes, pool.allocated_bytes);
  byId("pool-state").textContent = pool.state;
  byId("pool-state").className = pool.state === "keeping" ? "count" : "bad";
  byId("pool-bar").replaceChildren(bar([["pool", pinned], ["before", pool.allocated_bytes - pinned]], room, "the pool's share of its room"));
  byId("pool-line").textContent = `${bytes(pool.allocated_bytes)} on the disk, ${bytes(pinned)} pinned; ` +
    (pool.quota_bytes ? `quota ${bytes(pool.quota_bytes)}` : "no quota") + `, ${bytes(pool.free_bytes)} free on its file system`;
  byId("pool-more").textContent = `${pool.chunks} chunks in ${pool.segments} layers; evicted ${bytes(pool.evicted_bytes)}, scrubbed ${bytes(pool.scrubbed_bytes)}` +
    `, found damaged ${pool.scrub_wrong_chunks + pool.lost_chunks}. ${pool.path}`;
}

function showEvents(fresh) {
  for (const event of fresh) { events.unshift(event); lastEvent = Math.max(lastEvent, event.n); }
  events.length = Math.min(events.length, EVENTS_KEPT);
  if (fresh.length) drawEvents();
}

function drawEvents() {
  const warningsAlone = byId("level").value === "warning";
  const shown = events.filter((event) => !warningsAlone || !["info", "debug"].includes(event.level));
  const rows = shown.map((event) => {
    const time = element("time", event.time.slice(11, 19));
    time.dateTime = event.time;
    const fields = Object.entries(event.fields).map(([key, value]) => `${key}=${value}`).join(" ");
    return element("li", [time, element("b", event.event), ` ${fields}`], event.level);
  });
  byId("events").replaceChildren(...(rows.length ? rows : [element("li", "no such events yet", "quiet")]));
}

// --- asking

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (!answer.ok) throw new Error(`the node answers ${answer.status}`);
  return answer.json();
}

function say(text, state) {
  const live = byId("live");
  if (live.textContent !== text) live.textContent = text; // it is read aloud when it changes
  live.className = state;
}

async function look() {
  let wait = POLL_MS;
  try {
    const status = await ask("/status");
    if (status.node.pid !== lastPid) { lastEvent = 0; events.length = 0; before = null; rates.length = 0; }
    const { events: fresh } = await ask(`/events?after=${lastEvent}`);
    showNode(status); showSources(status); showRates(status); showSwarm(status); showMounts(status.mounts);
    showSeeds(status.seeds); showPool(status.pool); showEvents(fresh);
    lastPid = status.node.pid;
    say(paused ? "paused" : "live", paused ? "" : "on");
  } catch (error) {
    say("no answer", "off");
    byId("live").title = String(error);
    wait = SLOW_POLL_MS;
  }
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(look, wait);
}

function pause(on) {
  paused = on;
  byId("pause").setAttribute("aria-pressed", String(on));
  byId("pause").textContent = on ? "Go on" : "Pause";
  clearTimeout(timer);
  if (on) say("paused", ""); else look();
}

byId("pause").addEventListener("click", () => pause(!paused));
byId("level").addEventListener("change", drawEvents);
document.addEventListener("keydown", (event) => {
  if (event.key === "p" && !event.ctrlKey && !event.metaKey && !event.altKey && event.target.tagName !== "SELECT") pause(!paused);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) { clearTimeout(timer); look(); } });
look();
