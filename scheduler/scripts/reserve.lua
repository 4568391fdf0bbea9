-- Reserves requests and their estimated tokens from the budget of one API key, ahead of time: "send in d ms". Asks for a
-- slice: several requests of one lane, in their order, up to the first that has to wait.
-- Asking again with the same op gives the same grant.
-- include: pace
--
-- KEYS[1] state    hash    see pace.lua
-- KEYS[2] holders  zset    op -> when its permit is taken back
-- KEYS[3] grants   hash    op -> "start estimate request_cost_ms token_cost_ms bucket lane bulk_cost_ms"
-- KEYS[4] window   hash    bucket (a 120th of the window) -> "requests tokens"
-- KEYS[5] budgets  zset    key id -> when somebody last asked
-- ARGV[1] key id            string
-- ARGV[2] requests          per window, 0 = no limit
-- ARGV[3] tokens            per window, 0 = no limit
-- ARGV[4] concurrency       permits, 0 = no limit
-- ARGV[5] window            ms
-- ARGV[6] slack             ms by which arrivals at the provider may be nearer to each other than their starts
-- ARGV[7] max_wait          ms; a later start is not given, ask again
-- ARGV[8] holder_ttl        ms after its start at which a grant counts as abandoned
-- ARGV[9] busy              1 when requests of the last window are known of, 0 when none are, '' when nobody has looked;
--                           it matters for a budget without memory only: that is born closed for one window
-- ARGV[10] lane             'live' | 'bulk'
-- ARGV[11], [12], ...       pairs of op (string) and estimate (tokens, at least 1)
-- Reply: for each op, up to the first that has to wait, one of
--        {1, wait_ms, gate_ms} granted: send in wait_ms | {0, wait_ms, 0} the rate is used up: ask again in wait_ms
--        {0, wait_ms, 1} no permit is free: ask again in wait_ms | {-1, tokens} never: more than one window's tokens
--        {-2} this budget remembers nothing: look for requests of the last window, and ask again

-- LIVE_SHARE of tokens, requests and permits is kept from bulk while live has asked within the last window. Then bulk is
-- given its turns no more than a 240th of a window ahead, so live waits hardly longer. BULK_SHARE is what bulk gets however
-- much live there is.
local LIVE_SHARE, BULK_SHARE, PERMIT_POLL_MS = 0.2, 0.15, 100
-- Of the limits: what the pace leaves, and what the log of the window leaves for estimates that were too low.
local PACE_MARGIN, LOG_MARGIN = 0.02, 0.005

local lane, window, slack = ARGV[10], tonumber(ARGV[5]), tonumber(ARGV[6])
local max_wait, holder_ttl = tonumber(ARGV[7]), tonumber(ARGV[8])
-- What may be sent at once after a pause, in ms of the pace; and the width of a bucket.
local burst, width = window / 60, window / BUCKETS

local state = read_state(KEYS[1])
local changed, replies = {}, {}

local function put(name, value)
  state[name] = value
  changed[name] = value
end

if next(state) == nil and ARGV[9] == '' then return {{-2}} end

-- A clock that was set back: what is noted for later than anybody can be told is of another time, and worth nothing.
if (state.last or 0) > now + window + max_wait then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  state = {}
  put('gate', now + window)
end

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('ZREM', KEYS[2], '')
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ms(now), 'LIMIT', 0, 100)) do
  local grant = redis.call('HGET', KEYS[3], dead)
  if grant and string.match(grant, ' live ') then put('live', math.max(0, (state.live or 0) - 1)) end
  redis.call('ZREM', KEYS[2], dead)
  redis.call('HDEL', KEYS[3], dead)
end

if next(state) == nil and ARGV[9] == '1' then put('gate', now + window) end

local shared = now - (state.live_at or 0) < window
if lane == 'live' then
  -- Bulk has just had everything: it can wait for its turn.
  if not shared then put('bulk_due', now + window / 6) end
  put('live_at', now)
  shared = true
end
local max_requests = limit_of(state, 'requests', tonumber(ARGV[2]))
local max_tokens = limit_of(state, 'tokens', tonumber(ARGV[3]))
local cap = permits_of(state, limit_of(state, 'concurrency', tonumber(ARGV[4])), window)
local factor, held = factor_of(state, window), redis.call('ZCARD', KEYS[2])

local function permit_is_free()
  if cap == 0 then return true end
  if held >= cap then return false end
  if not shared or cap == 1 then return true end
  local live = state.live or 0
  if lane == 'bulk' then return held - live < cap - math.max(1, math.floor(cap * LIVE_SHARE)) end
  -- Bulk that waits for a permit gets its own share before live takes more.
  return now - (state.bulk_at or 0) > 5 * PERMIT_POLL_MS or live < cap - math.max(1, math.floor(cap * BULK_SHARE))
end

-- Pacing alone lets a window hold its share plus one request; the log of the window keeps the limit itself.
local logged, oldest, newest, requests, tokens = {}, math.huge, -math.huge, 0, 0
local log = redis.call('HGETALL', KEYS[4])
for i = 1, #log, 2 do
  local bucket = tonumber(log[i])
  if (bucket + 1) * width + window + slack <= now then
    redis.call('HDEL', KEYS[4], log[i])
  else
    local r, t = string.match(log[i + 1], '(%S+) (%S+)')
    local one = {requests = tonumber(r), tokens = tonumber(t)}
    logged[bucket], oldest, newest = one, math.min(oldest, bucket), math.max(newest, bucket)
    requests, tokens = requests + one.requests, tokens + one.tokens
  end
end

-- The earliest start at which no window holds more than the limits. Starts never go back, so each bucket is passed once.
local function when_the_window_has_room(start, estimate)
  while oldest <= newest do
    local one, leaves = logged[oldest], (oldest + 1) * width + window + slack
    if one and leaves > start then
      local too_many = max_requests > 0 and requests > 0 and requests + 1 > max_requests
      local too_much = max_tokens > 0 and tokens > 0 and tokens + estimate > max_tokens * (1 - LOG_MARGIN)
      if not (too_many or too_much) then break end
      start = leaves
    end
    if one then requests, tokens = requests - one.requests, tokens - one.tokens end
    oldest = oldest + 1
  end
  return start
end

local touched = {}
local function note(start, estimate)
  local bucket = math.floor(start / width)
  local one = logged[bucket] or {requests = 0, tokens = 0}
  logged[bucket], oldest, newest = one, math.min(oldest, bucket), math.max(newest, bucket)
  one.requests, one.tokens, touched[bucket] = one.requests + 1, one.tokens + estimate, one
  requests, tokens = requests + 1, tokens + estimate
  return bucket
end

local function reserve(op, estimate)
  local known = redis.call('HGET', KEYS[3], op)
  if known then return {1, whole(tonumber(string.match(known, '^%S+')) - now), whole((state.gate or 0) - now)} end
  if max_tokens > 0 and estimate > max_tokens then return {-1, max_tokens} end
  if not permit_is_free() then
    if lane == 'bulk' then put('bulk_at', now) end
    return {0, PERMIT_POLL_MS, 1}
  end

  local request_cost = max_requests > 0 and window / (max_requests * (1 - PACE_MARGIN) * factor) or 0
  local token_cost = max_tokens > 0 and estimate * window / (max_tokens * (1 - PACE_MARGIN) * factor) or 0
  local cost, bulk_cost = math.max(request_cost, token_cost), 0
  local start = math.max(now, state.gate or 0, state.last or 0,
    (state.tat_requests or 0) - burst, (state.tat_tokens or 0) - burst)
  if shared and lane == 'bulk' then
    bulk_cost = cost / (1 - LIVE_SHARE)
    start = math.max(start, (state.tat_bulk or 0) - burst)
  end
  start = when_the_window_has_room(start, estimate)
  local furthest = max_wait
  if shared and lane == 'bulk' then
    furthest = (state.bulk_due or 0) <= start and max_wait + burst or math.min(max_wait, burst / 4)
  end
  -- Whoever is refused comes again when half of the turns ahead are gone, and takes a slice: all who wait for the next turn
  -- would come for it at once, and all but one in vain.
  if start - now > furthest then return {0, whole(start - now - furthest / 2), 0} end

  local bucket = note(start, estimate)
  put('last', start)
  put('tat_requests', math.max(state.tat_requests or 0, start) + request_cost)
  put('tat_tokens', math.max(state.tat_tokens or 0, start) + token_cost)
  if lane == 'live' then
    put('live', (state.live or 0) + 1)
  elseif shared then
    put('tat_bulk', math.max(state.tat_bulk or 0, start) + bulk_cost)
    local due = cost / BULK_SHARE
    put('bulk_due', math.min(math.max(state.bulk_due or 0, start - window / 6) + due, start + math.max(due, window / 6)))
  end
  held = held + 1
  redis.call('ZADD', KEYS[2], ms(start + holder_ttl), op)
  redis.call('HSET', KEYS[3], op, string.format('%.3f %d %.6f %.6f %.0f %s %.6f',
    start, estimate, request_cost, token_cost, bucket, lane, bulk_cost))
  return {1, whole(start - now), 0}
end

for i = 11, #ARGV, 2 do
  local reply = reserve(ARGV[i], tonumber(ARGV[i + 1]))
  replies[#replies + 1] = reply
  if reply[1] == 0 then break end
end

for bucket, one in pairs(touched) do
  redis.call('HSET', KEYS[4], string.format('%.0f', bucket), string.format('%.0f %.0f', one.requests, one.tokens))
end
if next(changed) ~= nil then
  put('window', window)
  put('configured_requests', tonumber(ARGV[2]))
  put('configured_tokens', tonumber(ARGV[3]))
  put('configured_concurrency', tonumber(ARGV[4]))
  local fields = {}
  for name, value in pairs(changed) do
    fields[#fields + 1] = name
    fields[#fields + 1] = ms(value)
  end
  redis.call('HSET', KEYS[1], unpack(fields))
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', ms(now - KEPT_MS))
  redis.call('ZADD', KEYS[5], ms(now), ARGV[1])
  for i = 1, 5 do redis.call('PEXPIRE', KEYS[i], KEPT_MS) end
end
return replies
