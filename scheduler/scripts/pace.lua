-- What the scripts of the budget share: the clock, the state of one key, and what holds for it now.
--
-- state  hash  tat_requests, tat_tokens (theoretical arrival times), tat_bulk (of bulk while live is about), last (latest
--              start given), gate (closed until), factor and factor_at (rate adaptation), cap and cap_at (concurrency
--              adaptation), requests|tokens|concurrency and ..._at (limits that a refusal named, and when), live_at (live
--              asked last), bulk_due (bulk may take its turn before live), bulk_at (bulk was refused a permit), live (permits
--              that live holds), window and configured_... (as asked for last)
-- All times are this server's clock, in ms.
local RECOVERY_PER_WINDOW, BELIEVED_MS, KEPT_MS, BUCKETS = 0.09, 3600000, 86400000, 120

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000

local function ms(value) return string.format('%.3f', value) end
local function whole(value) return math.max(0, math.ceil(value)) end

local function read_state(key)
  local state, flat = {}, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do state[flat[i]] = tonumber(flat[i + 1]) end
  return state
end

-- The lower of what was configured and what a refusal named within the hour; 0 = no limit.
local function limit_of(state, name, configured)
  local named = state[name]
  if named and now - (state[name .. '_at'] or 0) < BELIEVED_MS and (configured == 0 or named < configured) then
    return named
  end
  return configured
end

local function factor_of(state, window)
  return math.min(1, (state.factor or 1) + RECOVERY_PER_WINDOW * (now - (state.factor_at or now)) / window)
end

-- Permits in all, 0 = no limit. `limit` is what holds without the lessons of refusals.
local function permits_of(state, limit, window)
  if not state.cap then return limit end
  local grown = state.cap + math.floor((now - state.cap_at) / window)
  return limit > 0 and math.min(limit, grown) or grown
end
